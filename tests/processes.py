"""How tests start processes: forked from a server that has imported torch, transformers and PEFT, which takes 6 s."""

import multiprocessing

START = "forkserver"
FORKED = multiprocessing.get_context(START)
FORKED.set_forkserver_preload(["flora.tuner", "transformers.trainer"])
