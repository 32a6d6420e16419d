"""Captions → encoded prompts: `flowreel prepare --only text`, for all that a recipe trains on.

Every stage of a recipe's curriculum has prompts of its own. T5 runs on Ray; hashing words is
quicker than starting it. What is written is `data_prep.texts`.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.texts.on_ray import written_on_ray
from data_prep.texts.records import Forms, TextSettings
from data_prep.texts.run import TextReport, prepare_texts, text_settings, texts_left
from pipeline.console import Reporter
from pipeline.recipes import Recipe
from pipeline.tables import say_encoded
from training.data.texts import both_forms, prompt_forms


def texts_to_do(recipe: Recipe, out: str | Path) -> tuple[TextSettings, int]:
    """Encoder and forms of a recipe's prompts, and how many shards have still to be written.

    Raises:
        LatentDatasetError: no dataset there, or not in the resolution of a stage.
        TextError: the encoder is not to be had.
    """
    parts = [(stage.flow, stage.train) for stage in recipe.curriculum]
    forms: Forms = {}
    for flow, config in parts or [(recipe.model, recipe.train)]:
        forms = both_forms(forms, prompt_forms(flow, config.batches, out))
    settings = text_settings(recipe.text, forms)
    return settings, texts_left(out, settings)


def runs_on_ray(settings: TextSettings) -> bool:
    """Whether prompts are encoded on Ray."""
    return settings.encoder.spec.kind != "hashed"


def encode_texts(settings: TextSettings, out: str | Path, reporter: Reporter) -> TextReport:
    """Encode what is left and say what there is. Ray must be running if it is needed.

    Raises as `data_prep.texts.run.prepare_texts`.
    """
    with reporter.progress("encoding prompts") as update:
        report = prepare_texts(
            out,
            settings,
            write_shards=written_on_ray if runs_on_ray(settings) else None,
            progress=lambda done, total: update(done, total, "shards"),
        )
    say_encoded(report, reporter)
    return report
