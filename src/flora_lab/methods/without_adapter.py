"""Methods that train weights of the model itself: all, the head, or the biases. They have no size to choose."""

from __future__ import annotations

from flora_lab.methods.common import AdaptedModel, CannotAdapt, Request, refuse_quantized, trainable


def full(request: Request) -> AdaptedModel:
    """Full fine-tuning: the reference for every adapter."""
    refuse_quantized(request.model)
    return AdaptedModel(request.model.requires_grad_(True))


def head_only(request: Request) -> AdaptedModel:
    """A linear probe: what the frozen features give by themselves."""
    if not request.head:
        raise CannotAdapt("the model has no head to train")
    refuse_quantized(request.model)
    request.train_head_only()
    return AdaptedModel(request.model)


def bitfit(request: Request) -> AdaptedModel:
    """BitFit trains every bias (Zaken et al. 2021)."""
    refuse_quantized(request.model)
    request.train_head_only()
    before = trainable(request.model)
    for name, parameter in request.model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    if trainable(request.model) == before:
        raise CannotAdapt("the model has no bias outside the head")
    return AdaptedModel(request.model)
