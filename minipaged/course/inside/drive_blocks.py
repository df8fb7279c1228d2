"""What assignment 2 is tried with, beside the student's code."""

from observe import outcome

from minipaged.memory.page_table import PageTable


def slots(case):
    table = PageTable(case["block_size"], case["blocks"], case["tokens"])
    return outcome(table.slots, case["start"], case["count"])
