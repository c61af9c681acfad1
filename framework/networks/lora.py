"""Low-rank adapters in a transformer's linear layers (Hu et al. 2021, arXiv:2106.09685), through ``peft``."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.errors import ConfigurationError


class SelfAttention(nn.Module):
    """The self-attention of an ``nn.MultiheadAttention`` with its two projections as linear layers that are called.

    The original hands their weights to one function, past any adapter. (peft's own layer for it adds the adapters to
    the weights before each forward and subtracts them after it: frozen weights drift by rounding, and are new
    parameters each time.)

    Args:
        original: with one width for query, key and value, and the batch first, as in torchvision's ViT.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        assert original.in_proj_weight is not None
        width = original.embed_dim
        bias = original.in_proj_bias is not None
        self.num_heads, self.dropout = original.num_heads, original.dropout
        with torch.device("meta"):  # the weights are the original's
            self.in_proj, self.out_proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.in_proj.weight, self.in_proj.bias = original.in_proj_weight, original.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = original.out_proj.weight, original.out_proj.bias
        self.train(original.training)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        """Attention of tokens ``[N, T, C]`` among themselves, ``[N, T, C]``; all three arguments are the tokens."""
        count, length, width = query.shape
        heads = self.in_proj(query).view(count, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind(0)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).reshape(count, length, width)), None

    def restored(self) -> nn.MultiheadAttention:
        """The attention that this one stands for, with its weights as they are now."""
        width, bias = self.out_proj.in_features, self.in_proj.bias is not None
        with torch.device("meta"):
            restored = nn.MultiheadAttention(width, self.num_heads, self.dropout, bias, batch_first=True)
        restored.in_proj_weight = self.in_proj.weight  # type: ignore[assignment]
        restored.in_proj_bias = self.in_proj.bias
        restored.out_proj.weight, restored.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return restored.train(self.training)

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether ``module`` is an attention that this one can stand for."""
        return (
            type(module) is nn.MultiheadAttention
            and module._qkv_same_embed_dim
            and module.batch_first
            and module.bias_k is None
            and not module.add_zero_attn
        )


def add_adapters(
    backbone: nn.Module,
    name: str,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: list[str] | None = None,
) -> list[str]:
    """Freeze ``backbone`` and put ``alpha / rank * B A`` beside the weights of its linear layers, in place.

    ``A`` ``[rank, in]`` is random and ``B`` ``[out, rank]`` zero, so that the outputs do not change at first. Layers
    whose weights are used without a call of the layer cannot have adapters: the attention's in torchvision's Swin and
    in timm's Swin v2 and BEiT. The attention of torchvision's ViT is rewritten to call its own.

    Args:
        backbone: a network with linear layers; ``preprocessing.image_size``, 224 without it, is what it is tried on.
        name: of it, for messages.
        rank: of the adapters.
        alpha: their scale is ``alpha / rank``.
        dropout: probability, of the adapters' inputs.
        targets: ends of the names of layers, such as ``qkv`` or ``mlp.fc1``; None for all that can have one.

    Returns:
        The names of the layers with adapters.

    Raises:
        ConfigurationError: peft is not installed, there are no linear layers, or a target is none or cannot have one.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            "Expected the package peft for `--model.policy lora`, but it is not installed: "
            "pip install 'transfer-framework[lora]'"
        ) from error
    for module in list(backbone.modules()):
        for key, child in module.named_children():
            if SelfAttention.replaces(child):
                setattr(module, key, SelfAttention(child))  # type: ignore[arg-type]
    chosen = _chosen(backbone, name, targets)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # used as a factor
        lora_dropout=dropout,
        target_modules="|".join(re.escape(layer) for layer in chosen),  # an expression, since names would be endings
    )
    backbone.requires_grad_(False)
    peft.inject_adapter_in_model(config, backbone)
    return chosen


def merge_adapters(backbone: nn.Module) -> nn.Module:
    """Add the adapters to the weights and take them out, in place: the network and its names are as before.

    So that a backbone that learned by adapters can be saved as weights for any other module:
    ``torch.save(merge_adapters(module.backbone).state_dict(), "weights.pth")``.
    """
    for module in list(backbone.modules()):
        for key, child in module.named_children():
            if hasattr(child, "lora_A"):
                child.merge(safe_merge=True)  # type: ignore[operator]
                setattr(module, key, child.base_layer)
    for module in list(backbone.modules()):
        for key, child in module.named_children():
            if isinstance(child, SelfAttention):
                setattr(module, key, child.restored())
    return backbone.requires_grad_(True)


def _chosen(backbone: nn.Module, name: str, targets: list[str] | None) -> list[str]:
    linear = [key for key, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    called = _called(backbone, name, linear) if linear else []
    if not called:
        raise ConfigurationError(
            "Expected `--model.backbone` to have linear layers, beside which `--model.policy lora` puts its adapters, "
            f"as transformers have, but got {name!r}, which has {'none that it calls' if linear else 'none'}."
        )
    if targets is None:
        return called
    for target in targets:
        matching = [key for key in linear if _ends(key, target)]
        if not matching:
            endings = sorted({key.rpartition(".")[2] for key in called})
            raise ConfigurationError(
                f"Expected `--model.lora_targets` to be ends of names of linear layers of {name!r} "
                f"({', '.join(endings)}), but got {target!r}."
            )
        unused = [key for key in matching if key not in called]
        if unused:
            raise ConfigurationError(
                f"Expected `--model.lora_targets` to be layers that can have adapters, but {name!r} uses the weights "
                f"of {unused[0]!r} without calling it."
            )
    if not targets:
        raise ConfigurationError("Expected `--model.lora_targets` to name layers, but got none.")
    return [key for key in called if any(_ends(key, target) for target in targets)]


def _ends(key: str, target: str) -> bool:
    return key == target or key.endswith(f".{target}")


def _called(backbone: nn.Module, name: str, layers: list[str]) -> list[str]:
    """Those of ``layers`` whose ``forward`` runs in the backbone's, found with tensors that have shapes only."""
    tensors = [*backbone.parameters(), *backbone.buffers()]
    shapes: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.to("meta")) if isinstance(tensor, nn.Parameter) else tensor.to("meta")
        for tensor in tensors
    }
    shape = copy.deepcopy(backbone, shapes).eval()  # no weight is copied
    found: set[str] = set()
    for key in layers:
        shape.get_submodule(key).register_forward_pre_hook(lambda module, inputs, key=key: found.add(key))
    size = getattr(getattr(backbone, "preprocessing", None), "image_size", 224)
    try:
        with torch.no_grad(), torch.device("meta"):
            shape(torch.empty(2, 3, size, size, dtype=next(backbone.parameters()).dtype))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        raise ConfigurationError(
            f"Expected `--model.backbone` {name!r} to take images of {size} x {size} pixels, to find the layers that "
            f"can have adapters, but got {type(error).__name__}: {error}"
        ) from error
    return [key for key in layers if key in found]
