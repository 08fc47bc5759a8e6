"""How an update runs.

`cost` chooses the form. `beside` (with `matrix`, `convolution`, `thin`) runs it beside the layer, `stand_in` runs the
layer with W + ΔW (`lazy` forms it when something computes with it), and `pool` (with `batched`) forms the weights of
many layers at once.
"""
