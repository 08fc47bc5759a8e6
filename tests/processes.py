"""How tests start processes: forked from one that has imported torch, transformers and PEFT, which takes 6 s."""

import multiprocessing

START = "forkserver"
multiprocessing.set_forkserver_preload(["flora.tuner", "transformers.trainer"])
