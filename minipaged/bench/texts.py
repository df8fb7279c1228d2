"""Real text, for loads where it matters what an answer says: guesses are right or wrong.

The quotes' answers say again what stands in their prompts, as far as a small model does: with SmolLM2-135M-Instruct,
greedy, at least two thirds of each answer stand in its prompt, in pieces of four tokens or more. The speech is
Lincoln's and the story Carroll's, in the public domain; the rest was written for this.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """What a user says: `ask` and then `about`. answer: tokens of the answer that are wanted; it has as many."""

    ask: str
    about: str
    answer: int


MAIL = """\
From: Karen Holt
Subject: The trip to the lighthouse

Hello everybody,

our bus leaves on Saturday at half past seven from the station, not at eight as I wrote before. Please bring warm \
clothes, because it is windy on the cliffs, and something to eat for the way. The boat to the island takes twelve \
people at a time, so we will cross in two groups, the first at ten and the second at eleven. The keeper of the \
lighthouse will show us the lamp and the old machine room. At three we meet at the harbour and have tea. We shall \
be back at about seven in the evening. If you can't come, please tell me before Thursday, so that somebody else \
can have your seat.

Best wishes,
Karen"""

PAGING = """\
A language model keeps the keys and values of every token that it has read. They are large: for a model of \
thirteen billion parameters, one token takes 800 KB. Early servers gave each request one piece of memory, as long \
as the longest answer that could come. Most answers are short, so most of that memory was never used. Paging cuts \
the memory into blocks of sixteen tokens. A request takes a block when it needs one, and gives all of them back \
when it ends. The blocks of a request may lie anywhere, and a page table says where. Two requests that begin with \
the same words can share the blocks of these words, and a block is copied only when one of them writes to it."""

TABLE = """\
| month | rain (mm) | sunny days | mean temperature |
|---|---|---|---|
| January | 71 | 4 | 1.2 |
| February | 52 | 6 | 2.1 |
| March | 58 | 9 | 5.4 |
| April | 44 | 12 | 9.0 |
| May | 63 | 14 | 13.6 |
| June | 75 | 13 | 16.9 |"""

CODE = """\
```python
def step(self):
    plan = self.scheduler.schedule()
    output = self.runner.execute(plan)
    finished = self.scheduler.update(plan, output)
    for request in finished:
        self.outputs[request.request_id] = request.tokens
    return finished


def generate(self, prompts):
    for prompt in prompts:
        self.add_request(prompt)
    while self.has_unfinished_requests:
        self.step()
    return [self.outputs[request_id] for request_id in sorted(self.outputs)]
```"""

SPEECH = """\
Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, \
and dedicated to the proposition that all men are created equal.

Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so dedicated, \
can long endure. We are met on a great battle-field of that war. We have come to dedicate a portion of that field, \
as a final resting place for those who here gave their lives that that nation might live. It is altogether fitting \
and proper that we should do this."""

LETTER = """\
Dear neighbours, the libary on Mill Street will be closed from the third to the tenth of March, becuase the roof \
has to be repaired. Books that are due in this week may be brought back untill the fifteenth, and nobody has to \
pay for the delay. The childrens' reading hour takes place in the school accross the street, on Wensday at four, \
as always. We are looking for people who can help us to carry boxes on the ninth and the tenth: coffee and cake \
will be there, and a warm room. Who wants to help, please write your name on the list at the dor, or call us in \
the mornings. We wish you a pleasent spring, and we hope to see all of you in the new reading room."""

ALICE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or \
twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and \
what is the use of a book," thought Alice, "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and \
stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the \
daisies, when suddenly a White Rabbit with pink eyes ran close by her."""

PEOPLE = """\
[
  {"name": "Anna Berg", "city": "Oslo", "age": 31, "email": "anna.berg@example.com"},
  {"name": "Luis Romero", "city": "Madrid", "age": 45, "email": "luis.romero@example.com"},
  {"name": "Mei Tanaka", "city": "Osaka", "age": 27, "email": "mei.tanaka@example.com"},
  {"name": "Peter Novak", "city": "Prague", "age": 52, "email": "peter.novak@example.com"},
  {"name": "Sara Lind", "city": "Malmo", "age": 38, "email": "sara.lind@example.com"}
]"""

QUOTES = [
    Text("Change the day of the trip to Sunday, and write the whole mail again.\n\n", MAIL, 128),
    Text("Summarise the following text by quoting its most important sentences.\n\n", PAGING, 128),
    Text("Give the following table again, word for word, with the rain in March changed to 85.\n\n", TABLE, 160),
    Text("Rename the variable `plan` to `todo` and give the whole code again.\n\n", CODE, 80),
    Text("Give the following speech again, word for word.\n\n", SPEECH, 112),
    Text("Correct the spelling of this letter and give the whole letter again.\n\n", LETTER, 128),
    Text("Tell this story again, word for word, but with Clara instead of Alice.\n\n", ALICE, 112),
    Text("Change the city of Anna Berg to Bergen, and give the whole JSON again.\n\n", PEOPLE, 192),
]
QUESTIONS = [
    Text("Why is the sky blue?", "", 96),
    Text("Write a short story about a dog who finds a key.", "", 96),
    Text("How do I cook rice so that it doesn't stick?", "", 96),
    Text("What is the difference between a virus and a bacterium?", "", 96),
    Text("Give me five ideas for a birthday party in winter.", "", 96),
    Text("Explain what a hash table is, to somebody who has just begun to program.", "", 96),
    Text("I can't sleep at night. What could help?", "", 96),
    Text("Who was Marie Curie, and what is she known for?", "", 96),
    Text("Write a polite mail to my landlord: the heating is broken.", "", 96),
    Text("Plan a weekend in Rome for two people who like art.", "", 96),
]
