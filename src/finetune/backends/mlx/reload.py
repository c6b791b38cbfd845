"""Loads a saved adapter on a fresh base, or a saved model, in this process and compares its logits with those saved.

Started by `finetune.evidence.reload`. mlx-lm alone does it: its own model, and its own layer for the adapter's kind
where it has one; of ours only what reads and renames the files is used.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from finetune.adapters.kinds import kind_of
from finetune.backends.mlx.adapter import read_adapter
from finetune.backends.mlx.layers import layer_shapes, put_on, weight_shapes
from finetune.backends.mlx.load import Loaded, linear_layers, load_model
from finetune.backends.mlx.packed import is_packed
from finetune.backends.mlx.tensors import read_tensors
from finetune.backends.mlx.token_rows import TableWithRows, tables_of
from finetune.records import ModelLocation, Quantization


def main() -> None:
    """Read one request from standard input, compare, print one JSON object."""
    request = json.load(sys.stdin)
    prompts = request["prompts"]
    saved = read_tensors(Path(request["logits"]), "the saved logits")
    wanted = [saved[str(index)] for index in range(len(prompts))]
    quantize = Quantization(**request["quantize"]) if request.get("quantize") else None
    loaded = load_model(ModelLocation(request["folder"], Path(request["folder"]), "local"), request["dtype"], quantize)
    base = [loaded.model(mx.array([ids]))[0].astype(mx.float32) for ids in prompts]
    if "model" in request:
        loaded = load_model(ModelLocation(request["model"], Path(request["model"]), "local"), request["dtype"])
    else:
        _put_on(loaded, Path(request["adapter"]))
    loaded.model.eval()
    tuned = [loaded.model(mx.array([ids]))[0].astype(mx.float32) for ids in prompts]
    answer = {
        "prompts": len(wanted),
        "largest_logit": max(float(mx.abs(logits).max().item()) for logits in wanted),
        "difference": max(float(mx.abs(a - b).max().item()) for a, b in zip(tuned, wanted, strict=True)),
        "difference_from_base": max(float(mx.abs(a - b).max().item()) for a, b in zip(base, wanted, strict=True)),
    }
    json.dump(answer, sys.stdout)


def _put_on(loaded: Loaded, folder: Path) -> None:
    """Put the adapter in `folder` on the model with mlx-lm's own layers."""
    names = loaded.names
    target, tensors = read_adapter(weight_shapes(loaded), layer_shapes(loaded), names, folder)
    kind = kind_of(target)
    if not kind.mlx_lm_layer:
        put_on(loaded, target, tensors)
        return
    module_name, _, class_name = kind.mlx_lm_layer.partition(":")
    layer_class = getattr(import_module(module_name), class_name)
    layers = []
    for path, module in linear_layers(loaded.model).items():
        shown = names.shown(path)
        if shown in tensors.parts:
            layer = layer_class.from_base(module, r=target.rank_of(shown), scale=target.scale_of(shown))
            for key, name in kind.mlx_lm_names.items():
                setattr(layer, name, tensors.parts[shown][key].T)
            layers.append((path, layer))
    places = dict(tree_flatten(loaded.model.parameters()))
    saved = {
        place: tensors.saved[names.shown(place)].astype(tensor.dtype)
        for place, tensor in places.items()
        if names.shown(place) in tensors.saved
    }
    for path, base in tables_of(loaded, tensors.rows).items():
        numbers = target.rows[names.shown(path)]
        table = TableWithRows(base, tensors.rows[names.shown(path)], numbers)
        # Where the table is plain, it is one as mlx-lm has it, with the rows in it.
        layers += [(path, table)] if is_packed(base) else []
        saved |= {} if is_packed(base) else {f"{path}.weight": table.merged()}
    loaded.model.update_modules(tree_unflatten(layers))
    loaded.model.update(tree_unflatten(list(saved.items())))


if __name__ == "__main__":
    main()
