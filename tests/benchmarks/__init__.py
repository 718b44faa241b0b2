"""stager beside the other ways to checkpoint, in one run. ``docs/benchmarks.md`` says what is measured and how to read it.

    options.py    what the user asked for          workload.py   the state of a case
    run.py        passes, order, what is next      cases.py      the cases by name
    launch.py     one child process, its deadline  peers/        the ways to save that are compared
    child.py      what runs inside it              limits.py     memcpy and raw write beside each save
      saves.py    cases that are one state         footprint.py  memory of a process tree, descriptors
      training.py the training loop                records.py    what a child reports, one JSON line each
      soak.py     thousands of saves               results.py    everything of a run, to and from JSON
                                                   summary.py, criteria.py, report.py, chart.py, machine.py
    scale/        thousands of ranks, simulated: a program of its own

Nothing here is a test on time. ``test_benchmarks.py`` runs it tiny, and looks at the structure of what comes out.
"""
