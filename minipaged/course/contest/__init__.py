"""The contest of assignment 6: a student's engine beside the reference, in one run, so that the machine doesn't matter.

Both are processes of their own, and get the same requests at the same times by their clocks, which run while they run:
by turns, half a second each, and whoever waits is stopped. An answer counts only if its tokens are the reference's.
They can be, to the last one: with the kernels in C++ and fp32, a request's numbers don't depend on its company (see
`same_bits` in kernels/cpp.py). All figures are ratios, of one round each, and the median of the rounds stands.

    load.py       what is asked, and when
    tree.py       the package of a student, and its C++
    process.py    an engine in a process, and its clock outside
    playing.py    a contest, round by round
    points.py     ratios, points, and the leaderboard
    command.py    `python -m minipaged.course contest`
"""
