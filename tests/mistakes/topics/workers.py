"""The pool."""

from tests.mistakes.mistake import Topic, python

_POOL = "from stager.workers import WorkerPool\n\n"

TOPIC = Topic(
    "The worker pool",
    (
        python("A pool without workers", _POOL + "WorkerPool(count=0)"),
        python(
            "A name in place of a function",
            _POOL + 'with WorkerPool(count=1) as pool:\n    pool.submit("train").result()',
        ),
        python(
            "A function that is called, not given",
            _POOL + "with WorkerPool(count=1) as pool:\n    pool.submit(sum([1, 2])).result()",
        ),
        python(
            "A function that raises",
            _POOL + "with WorkerPool(count=1) as pool:\n    pool.submit(lambda: 1 / 0).result()",
        ),
        python(
            "An argument that cannot be pickled",
            _POOL + 'with WorkerPool(count=1) as pool:\n    pool.submit(print, open("log.txt", "w")).result()',
        ),
        python(
            "A result that cannot be pickled",
            _POOL + "with WorkerPool(count=1) as pool:\n    pool.submit(lambda: (x for x in range(3))).result()",
        ),
        python("After close()", _POOL + "pool = WorkerPool(count=1)\npool.close()\npool.submit(print)"),
    ),
)
