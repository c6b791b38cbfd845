"""`ft estimate`: the bytes a run is certain to need, before it starts."""

from finetune.cli.console import data_console, print_json
from finetune.cli.options import (
    AsJson,
    Assignments,
    ConfigFile,
    DataFile,
    ModelName,
    ProfileName,
    TemplateName,
    flags_of,
    gather,
)


def command(
    config: ConfigFile = None,
    *,
    model: ModelName = None,
    data: DataFile = None,
    template: TemplateName = None,
    profile: ProfileName = None,
    assignments: Assignments = None,
    json_output: AsJson = False,
) -> int:
    """Tell what weights, adapter, gradients and optimizer take, for LoRA and for full fine-tuning.

    These parts are exact. Activations, logits and the framework come on top and are not guessed here.
    """
    from dataclasses import asdict

    from finetune.assembly.prepare import adapter_target
    from finetune.memory.estimate import estimate_memory
    from finetune.models.locate import locate_model
    from finetune.models.shape import read_shape

    settings = gather(config, flags_of(model, data, template), assignments, profile).config
    shape = read_shape(locate_model(settings.model.path, revision=settings.model.revision).folder)
    target = adapter_target(settings, shape)
    lora = estimate_memory(shape, target, settings.model.dtype)
    full = estimate_memory(shape, None, settings.model.dtype)
    if json_output:
        print_json(
            {
                "model": settings.model.path,
                "parameters": shape.parameters,
                "lora": {**asdict(lora), "total": lora.total},
                "full": {**asdict(full), "total": full.total},
            }
        )
        return 0
    from rich.table import Table

    table = Table("part", "LoRA", "full fine-tuning", box=None, title=f"{settings.model.path}: exact parts, in bytes")
    for part in ("weights", "adapter", "gradients", "optimizer", "total"):
        table.add_row(part, f"{getattr(lora, part):,}", f"{getattr(full, part):,}")
    console = data_console()
    console.print(table)
    console.print(f"not included: {', '.join(lora.not_included)}", markup=False)
    return 0
