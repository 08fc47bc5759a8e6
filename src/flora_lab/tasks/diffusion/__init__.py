"""What `text_to_image` is made of.

`captions` reads the data, `noise` says what is learned from them, `pipeline` loads a model of diffusers, and `denoiser`
is its form for training. `callbacks` averages weights, `samples` makes pictures, `quality` judges them, and `files`
exports adapters.
"""
