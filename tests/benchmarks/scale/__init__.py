"""How agreement, save and commit behave on more ranks than there are here. ``docs/scale.md`` says what comes out.

    __main__.py    the program                    simulation.py  who does what when, on a clock of its own
    parameters.py  what is assumed                store.py       the key-value store, and a rank's board on it
    measuring.py,  what is measured of the        agreement.py   the first save of a structure
    child.py,      real code, in processes        filesystem.py  the metadata server, the partial directory
    stock_child.py of their own                   saving.py      a later save: parts and commit
    fit.py,        what that says of other        ending.py      how all ranks come to know of the commit
    costs.py       sizes                          stock.py       the messages of dcp.async_save
    run.py, report.py  figures, tables

Keys, notes, waits and calls are those of the code: ``test_scale.py`` runs both on few ranks, and compares. For that,
``turns.py`` gives the real code the simulation's clock.
"""
