"""RoPE scaling through transformers' own parameters, and the switch between native and scaled RoPE on one module.

A scaling is written `type:factor[,name=value...]`:

* `linear:4`: position interpolation, all frequencies divided by the factor (Chen et al., arXiv 2306.15595);
* `ntk:4`: a larger base, theta * factor^(d / (d - 2)) (u/bloc97), recorded as a plain `rope_theta`;
* `dynamic:4`: the same, growing at run time with the length; nothing changes inside the native context;
* `yarn:4[,beta_fast=32,beta_slow=1]`: YaRN (Peng et al., arXiv 2309.00071);
* `llama3:8[,low_freq_factor=1,high_freq_factor=4]`: the scaling of Llama 3.1;
* `longrope:4,factors=FILE[,attention_factor=...]`: LongRoPE (Ding et al., arXiv 2402.13753); the JSON file holds the
  lists `short_factor` and `long_factor` that divide each frequency inside and beyond the native context.

`theta=...` replaces the base in any of them (`ntk:4,theta=2e7` is a raised base alone); everything lands in the
configuration, so that plain transformers loads the saved model.
"""

import copy
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from linearard.capture import transformers_model
from linearard.errors import UserError

# The options of each type besides theta, with the defaults that transformers requires to be spelled out.
_OPTIONS: dict[str, dict[str, float | None]] = {
    "linear": {},
    "ntk": {},
    "dynamic": {},
    "yarn": {"beta_fast": None, "beta_slow": None, "attention_factor": None},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"attention_factor": None},
}
# Types whose parameters name the context that they start from.
_WITH_ORIGINAL_CONTEXT = ("yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """A parsed scaling: its type, the factor by which the context grows, a new base or None, and its options."""

    kind: str
    factor: float
    theta: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "RopeScaling":
        """Read `type:factor[,name=value...]`; raises UserError with the reason."""
        head, *pairs = text.strip().split(",")
        kind, _, factor_text = head.partition(":")
        if kind not in _OPTIONS:
            raise UserError(f"unknown RoPE scaling {text!r}: write one of {', '.join(_OPTIONS)} and a factor: linear:4")
        factor = _number(factor_text, f"the factor of the RoPE scaling {text!r}")
        if factor <= 1:
            raise UserError(f"the RoPE scaling {text!r} does not extend the context: its factor must be larger than 1")
        options: dict[str, Any] = {name: value for name, value in _OPTIONS[kind].items() if value is not None}
        theta = None
        for pair in pairs:
            name, _, value_text = pair.partition("=")
            if kind == "longrope" and name == "factors":
                options |= _longrope_factors(value_text)
                continue
            value = _number(value_text, f"{name!r} of the RoPE scaling {text!r}")
            if name == "theta":
                theta = value
            elif name in _OPTIONS[kind] and value <= 0:
                raise UserError(f"{name!r} of the RoPE scaling {text!r} must be larger than 0")
            elif name in _OPTIONS[kind]:
                options[name] = value
            else:
                valid = ", ".join(["theta", *_OPTIONS[kind]])
                raise UserError(f"unknown option {name!r} of the RoPE scaling {text!r}; valid: {valid}")
        if kind == "longrope" and "long_factor" not in options:
            raise UserError(f"the RoPE scaling {text!r} needs the factors of each frequency: {text},factors=FILE.json")
        return cls(kind, factor, theta, options)

    def parameters(self, native: dict[str, Any], context: int, rotary_dimension: int) -> dict[str, Any]:
        """transformers' `rope_parameters` of the scaled model.

        native: the parameters of the unscaled model; context: its context in tokens; rotary_dimension: the number of
        rotated dimensions of a head.
        """
        kept = {name: value for name, value in native.items() if name in ("rope_theta", "partial_rotary_factor")}
        if self.theta is not None:
            if self.theta <= kept["rope_theta"]:
                raise UserError(
                    f"theta {self.theta:g} does not extend the context: the model's own is {kept['rope_theta']:g}"
                )
            kept["rope_theta"] = self.theta
        if self.kind == "ntk":
            if self.theta is None:
                kept["rope_theta"] *= self.factor ** (rotary_dimension / (rotary_dimension - 2))
            return {**kept, "rope_type": "default"}
        for name in ("short_factor", "long_factor"):
            if len(self.options.get(name, [])) not in (0, rotary_dimension // 2):
                raise UserError(
                    f"longrope's {name} has {len(self.options[name])} numbers, the model rotates "
                    f"{rotary_dimension // 2} pairs of dimensions"
                )
        scaled = {**kept, "rope_type": self.kind, "factor": self.factor, **self.options}
        if self.kind in _WITH_ORIGINAL_CONTEXT:
            scaled["original_max_position_embeddings"] = context
        return scaled


def _longrope_factors(file: str) -> dict[str, list[float]]:
    try:
        content = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read longrope's factors from {file!r}: {error}") from error
    names = ("short_factor", "long_factor")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), list) and all(isinstance(x, (int, float)) and x > 0 for x in content[name])
        for name in names
    ):
        raise UserError(f"longrope's factors in {file!r} have to be two lists of positive numbers: {', '.join(names)}")
    return {name: content[name] for name in names}


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{what} must be a number, got {text!r}")
    return value


@dataclass
class _Site:
    """A rotary module's place in the model, with its two versions."""

    parent: nn.Module
    name: str
    native: nn.Module
    scaled: nn.Module


class RopeSwitch:
    """Native and scaled RoPE of one model; made by `scale_rope`, which leaves the model scaled."""

    def __init__(self, sites: list[_Site]) -> None:
        self._sites = sites
        self._attach(native=False)

    @contextmanager
    def native(self) -> Iterator[None]:
        """Run the body with the native RoPE; the scaled one comes back afterwards."""
        self._attach(native=True)
        try:
            yield
        finally:
            self._attach(native=False)

    def scaled_modules(self) -> list[nn.Module]:
        """The rotary modules with scaled frequencies, on the model's device."""
        for site in self._sites:
            current = getattr(site.parent, site.name)
            site.scaled = _in_float32(site.scaled, _buffer(current).device)
        return [site.scaled for site in self._sites]

    def _attach(self, native: bool) -> None:
        for site in self._sites:
            current = getattr(site.parent, site.name)
            module = _in_float32(site.native if native else site.scaled, _buffer(current).device)
            if native:
                site.native = module
            else:
                site.scaled = module
            setattr(site.parent, site.name, module)


def scale_rope(model: nn.Module, scaling: RopeScaling) -> RopeSwitch:
    """Scale the RoPE of `model` (transformers, possibly wrapped by peft) in place and record it in its configuration.

    Models with one RoPE per layer type (Gemma 3) keep that of their sliding windows. Raises UserError for a model
    without RoPE, with an unknown kind of it, or already scaled.
    """
    base = transformers_model(model)
    config = base.config.get_text_config(decoder=True)
    sites = _rotary_sites(base)
    if not sites:
        raise _without_rope(base)
    native_config = copy.deepcopy(config)
    scale_config(config, scaling)
    return RopeSwitch(
        [
            _Site(parent, name, _rebuilt(module, native_config), _rebuilt(module, config))
            for parent, name, module in sites
        ]
    )


def scale_config(config: PretrainedConfig, scaling: RopeScaling) -> None:
    """Record the scaling in `config` in place, as `scale_rope` does with a model's; raises UserError as it does."""
    config = config.get_text_config(decoder=True)
    if not getattr(config, "rope_parameters", None):
        raise _without_rope(config)
    # Assigned, not passed to a constructor: the same object is the configuration of every layer.
    config.rope_parameters = _scaled_parameters(config, scaling)
    if scaling.kind != "dynamic":  # transformers' dynamic scaling grows from the native context
        config.max_position_embeddings = round(config.max_position_embeddings * scaling.factor)


def attention_factors(model: nn.Module, layers: Iterable[int]) -> dict[int, float]:
    """What the RoPE of `model` multiplies queries and keys of these layers by; other than 1 for YaRN and longrope.

    Where there is one RoPE per layer type (Gemma 3), each layer has that of its type.
    """
    base = transformers_model(model)
    factors = {
        name.removesuffix("attention_scaling").removesuffix("_"): float(value)
        for _, _, module in _rotary_sites(base)
        for name, value in vars(module).items()
        if name.endswith("attention_scaling")
    }
    kinds = getattr(base.config.get_text_config(decoder=True), "layer_types", None) or []
    everywhere = factors.get("", 1.0)
    return {layer: factors.get(kinds[layer], everywhere) if layer < len(kinds) else everywhere for layer in layers}


def frequencies_are_fixed(model: nn.Module) -> bool:
    """Whether the RoPE of `model` is the same at every length; dynamic and longrope look at the positions first."""
    kinds = [getattr(module, "rope_type", "default") for _, _, module in _rotary_sites(transformers_model(model))]
    return not any("dynamic" in str(kind) or "longrope" in str(kind) for kind in kinds)


def context_of(model: nn.Module) -> int:
    """The longest sequence in tokens that the RoPE of `model` is made for, scaling included."""
    return configured_context(transformers_model(model).config)


def configured_context(config: PretrainedConfig) -> int:
    """The same from a configuration."""
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    grows = parameters.get("factor", 1.0) if parameters.get("rope_type") == "dynamic" else 1.0
    context: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return round(context * grows)


def check_length(length: int, context: int, what: str) -> None:
    """Raise UserError when sequences of `length` tokens do not fit into `context`; `what` names the setting."""
    if length > context:
        raise UserError(f"{what} of {length} tokens is longer than the model's range of {context}")


def restore_float32_rope(model: nn.Module) -> None:
    """Rebuild the inverse frequencies in float32, after a cast of the whole model to another dtype."""
    for parent, name, module in _rotary_sites(transformers_model(model)):
        setattr(parent, name, _in_float32(module, _buffer(module).device))


def _without_rope(owner: object) -> UserError:
    return UserError(f"{type(owner).__name__} has no rotary position embedding (RoPE) that could be scaled")


def _scaled_parameters(config: PretrainedConfig, scaling: RopeScaling) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def scaled(native: dict[str, Any]) -> dict[str, Any]:
        kind = native.get("rope_type", "default")
        if kind != "default":
            raise UserError(f"the model's RoPE is scaled already ({kind}); start from the model with its native RoPE")
        dimension = int(head_dim * native.get("partial_rotary_factor", 1.0))
        return scaling.parameters(native, config.max_position_embeddings, dimension)

    parameters = config.rope_parameters
    if "rope_theta" in parameters or "rope_type" in parameters:
        return scaled(parameters)
    return {
        layer_type: native if native is None or "sliding" in layer_type else scaled(native)
        for layer_type, native in parameters.items()
    }


def _rotary_sites(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, attribute name, rotary module) of every module with inverse frequencies made from a configuration."""
    return [
        (parent, name, module)
        for parent in model.modules()
        for name, module in parent.named_children()
        if isinstance(getattr(module, "config", None), PretrainedConfig)
        and any(buffer_name.endswith("inv_freq") for buffer_name, _ in module.named_buffers(recurse=False))
    ]


def _buffer(module: nn.Module) -> torch.Tensor:
    return next(buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq"))


def _rebuilt(module: nn.Module, config: PretrainedConfig) -> nn.Module:
    """A new rotary module of the same class, float32, on the same device."""
    with torch.device("cpu"):
        rebuilt: nn.Module = type(module)(config=config)
    return rebuilt.to(_buffer(module).device)


def _in_float32(module: nn.Module, device: torch.device) -> nn.Module:
    """The module itself, on `device`; a new one if a cast of the model has taken its inverse frequencies along."""
    if _buffer(module).dtype != torch.float32:
        config = module.config
        assert isinstance(config, PretrainedConfig)
        module = _rebuilt(module, config)
    return module.to(device)
