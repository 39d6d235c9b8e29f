"""`ppomax` under torchrun, where in each attempt one rank may kill itself.

DIE in the environment is a list, one entry for each attempt: [rank, module, attribute, text, count]
kills that rank before the count-th call of module.attribute whose arguments hold the text.
"""

import importlib
import json
import os
import signal
import sys


def main():
    plan = json.loads(os.environ["DIE"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt < len(plan) and int(os.environ["RANK"]) == plan[attempt][0]:
        trap(*plan[attempt][1:])
    from ppomax import cli

    cli.main()


def trap(module, attribute, text, count):
    home = importlib.import_module(module)
    inner = getattr(home, attribute)
    seen = []

    def wrapper(*args, **keywords):
        if not text or text in repr((args, keywords)):
            seen.append(1)
            if len(seen) == count:
                print("dying:", attribute, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **keywords)

    setattr(home, attribute, wrapper)


if __name__ == "__main__":
    sys.exit(main())
