"""What happens when something goes wrong: kills, full disks, damaged, cut off and hostile files.

``python -m faults`` (``make faults``) does each of them to real commands and prints a table; ``--write`` puts it into
``docs/reliability.md``. It is no part of the everyday tests, which take a few of its cases: hundreds of faults in
minutes are too slow for them, and its result is a table of counts, not a list of passed tests.
"""
