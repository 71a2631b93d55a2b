"""Advice after a merge: what to try if it lost much of the adapters' delta, and what was not measured."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluate import Capture
from .layer_report import LayerMergeReport
from .strategies import STRATEGIES

# If less than this fraction of the adapter's effect, or of its delta, is retained, another strategy is recommended.
LOW_CAPTURE = 0.9


def recommendation(
    layers: Sequence[LayerMergeReport],
    *,
    capture: Capture | None,
    output_retained: float | None,
    delta_retained: float,
) -> str | None:
    """What to try instead, or that nothing was merged; None if the merge lost little.

    Args:
        layers: their reports.
        capture: measured on held-out text, or None.
        output_retained, delta_retained: over all layers.
    """
    if layers and (said := nothing_merged(layers)):
        return said
    done = {layer.strategy for layer in layers}
    if capture is not None and capture.is_measurable:
        retained, what = capture.capture, "effect on the predictions is left"
        if capture.gain_retained is not None and capture.gain_retained < retained:
            retained, what = capture.gain_retained, "gain in loss is left"
    elif any(layer.is_merge_aware and layer.strategy != "aware" for layer in layers):
        return (
            'The adapters were trained merge-aware, and only strategy="aware" gives the model that was trained: '
            "without the rounding they compute something else."
        )
    elif done == {"aware"}:
        return None  # the delta in the weights is not what was trained; the outputs are
    elif output_retained is not None:
        retained, what = output_retained, "delta in the outputs is left"
    else:
        retained, what = delta_retained, "delta is in the weights"
    if retained >= LOW_CAPTURE:
        return None
    others = ["more text to calibrate on, or finetune_epochs in the Calibration"] if "calibrated" in done else []
    others += [way for name, way in _other_ways(layers).items() if name not in done]
    said = f"{retained:.2f} of the adapter's {what}."
    if retained < 0:
        said = "Rounding moved the predictions further than the adapter did."
    return said + (f" Instead: {'; or '.join(others)}." if others else "")


def nothing_merged(layers: Sequence[LayerMergeReport]) -> str | None:
    """That the merge changed no quantized weight, and what that may come from; None if it changed some."""
    if not layers:
        return (
            "No quantized weight was merged: the adapters lie on float layers only, as on a base that was loaded "
            "without quantization."
        )
    if any(layer.delta_norm for layer in layers):
        return None
    return (
        f"The delta of all {len(layers)} quantized layers with an adapter is zero: merging changed no "
        "weight. Was the adapter trained? model.print_trainable_parameters() must not say 0 (a frozen adapter), and a "
        "loaded one must have its file's tensors."
    )


def not_measured(layers: Sequence[LayerMergeReport], *, is_captured: bool, noise: float) -> str | None:
    """What was not measured; None if the predictions were compared, or if rounding added little noise.

    Args:
        layers: their reports.
        is_captured: whether predictions were compared.
        noise: of rounding, over the norm of the delta.
    """
    rounded = any(STRATEGIES[layer.strategy].adds_noise for layer in layers)
    if is_captured or not rounded or noise**2 < 1 - LOW_CAPTURE:
        return None
    return (
        f"Rounding added noise {noise:.2f} times as large as the adapter's delta. What that does to the predictions "
        "was not measured: give evaluate_on=held-out token ids."
    )


def _other_ways(layers: Sequence[LayerMergeReport]) -> dict[str, str]:
    """Strategies that these layers could be merged with, the best first, each with its description."""
    if any(layer.is_merge_aware for layer in layers):
        return {"aware": 'strategy="aware", which these adapters were trained for'}
    possible = set.intersection(*(set(layer.strategies) for layer in layers)) if layers else set()
    found = {
        name: strategy.advice
        for name, strategy in STRATEGIES.items()
        if name in possible and strategy.advice is not None
    }
    if "aware" in found and all(layer.can_be_qalora for layer in layers):
        found["qalora"] = "train with QA-LoRA, which merges exactly"
    if "keep" not in found:
        found["dense"] = 'strategy="dense", a float model, which loses nothing'
    return found
