"""`flora train` and `flora compare`: a job's folder, its trials, and the row that each trial leaves.

`fit` is the training loop, `trainer` transformers' Trainer in it, `base` the base model, `trial` one trial, `saved`
what a trial writes and reads again, `preflight` what is checked before the first, `job` the folder, `engines` where
trials run.
"""
