"""`raytrain evaluate`: attacks on the test set, here or on Ray, and their record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from raytrain.attacks.autoattack import EDITION
from raytrain.commands.imported import CHOSEN, imported
from raytrain.commands.results import Result, ShownResult, word_of
from raytrain.commands.train import own_tracker
from raytrain.config.request import (
    Overrides,
    override,
    parse_overrides,
    validated,
    with_keywords,
)
from raytrain.config.run import RunConfig
from raytrain.config.unknown_field import elsewhere
from raytrain.core.console import log_line
from raytrain.core.distributed_context import local_context
from raytrain.core.errors import RequestError, TrainingFailed
from raytrain.core.files import atomic_writer, write_atomically
from raytrain.core.nearest import nearest
from raytrain.core.signals import interruptible
from raytrain.core.storage import local_root, push, shown
from raytrain.data.loader import open_test
from raytrain.data.reading import Selection
from raytrain.distributed.evaluator_pool import evaluator_pool
from raytrain.evaluation.examples import examples_table
from raytrain.evaluation.previous import Earlier
from raytrain.evaluation.record import (
    EXAMPLES,
    FLAGS,
    FOLDER,
    RECORD,
    EvaluationRecord,
    RecordedContract,
    checks_tag,
    scope_of,
)
from raytrain.evaluation.result_log import ResultLog
from raytrain.evaluation.runner import Watch, run
from raytrain.evaluation.settings import EvaluationSettings
from raytrain.evaluation.table import accuracies, findings_after, flags_table
from raytrain.models import ROBUSTBENCH
from raytrain.tracking import Tracker, tracking_uri
from raytrain.tracking.checkpoint_lookup import checkpoint_file
from raytrain.tracking.data_sets import Input, as_input, digest
from raytrain.tracking.provenance import contract_of, hardware
from raytrain.training.checkpoint import load
from raytrain.training.run_folder import run_id_of

if TYPE_CHECKING:
    import pandas as pd

_RUN_FIELDS = ("data", "threat", "tracking_uri", "device", "workers")
_RUN_FIELDS += ("cpus_per_worker", "gpus_per_worker", "max_failures")
RESULT_LOG = "verdicts.jsonl"


class EvalResult(ShownResult, EvaluationRecord):
    """The record of an evaluation on the test set, and where it is stored."""

    file: Path  # the checkpoint
    folder: Path  # of flags.parquet, evaluation.json and examples.parquet
    run_id: str | None
    tracking_uri: str | None = None

    def frame(self) -> pd.DataFrame:
        """A row per test image, by index: its label, its prediction, and a flag per attack (true: survived).

        They are those of the file, to which later evaluations of the same images add their attacks.
        AutoAttack's stages are missing where an image had fallen before.
        """
        import pandas as pd
        import pyarrow.parquet as pq

        kinds = {pa.bool_(): pd.BooleanDtype()}
        table = pq.read_table(self.folder / FLAGS)
        return table.to_pandas(types_mapper=kinds.get).set_index("index")

    @property
    def weights(self) -> Path:
        """What `evaluate` and `export` take: the checkpoint."""
        return self.file

    @property
    def recorded(self) -> str:
        """What `compare` takes: the id of the run, or the file, which belongs to none."""
        return self.run_id or str(self.file)

    def summary(self) -> tuple[str, dict[str, str]]:
        """Its scope, and every accuracy with 95 % limits."""
        shares = {
            name: f"{share.value:.2%} [{share.low:.2%}, {share.high:.2%}]"
            for name, share in self.accuracies.items()
        }
        failed = ", ".join(finding.check for finding in self.failed)
        passed = "passed" if self.findings else "not run"
        checks = f"FAILED: {failed}" if failed else passed
        return self.scope, {
            **shares,
            "images": f"{self.images:,}",
            "checks": checks,
            "checkpoint": shown(self.file),
        }

    def json(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Plain values, for `--json`."""
        values = self.model_dump(mode="json", exclude={"file", "key", "seed", "tracking_uri"})
        return {**values, "checkpoint": str(self.file)}


def evaluate(
    run_or_checkpoint: Result | str | Path,
    overrides: Overrides = (),
    *,
    which: str | None = None,
    another_contract: bool = False,
    storage: Path | str = Path("runs"),
    watch: Watch | None = None,
    **fields: Any,
) -> EvalResult:
    """Attack a network on the test set, image by image, and record it on the run it belongs to.

    `run_or_checkpoint` is the result of `train` or `tune` (its best trial), a word as `run_of` takes it
    (the name of a run, its id or the beginning of one, the name of a sweep for its best trial, `last`), a
    checkpoint folder or a checkpoint file; or `robustbench:FILE`, weights of RobustBench, which become a run
    (see `imported`) with the `data`, the `threat`, and the `model.mean` and `model.std` that are given.
    `which` picks one of a run's checkpoints, `best` or `last`, the best one that there is if not given.
    `overrides` (words or a mapping) and `fields` are fields of `EvaluationSettings` (`attacks="pgd,aa"`,
    `steps=50`), or `data`, `workers`, `device` and `tracking_uri` of the run; with `another_contract` also
    `threat`, and the numbers are labelled so. An interrupted evaluation is resumed. With several workers,
    or RAY_ADDRESS, images are shared among processes.

    Raises:
        RequestError: if there is no such run, or the request does not fit it.
        TrainingFailed: if the result cannot be written.
    """
    word = word_of(run_or_checkpoint)
    of_file = word.startswith(ROBUSTBENCH)
    run_changes, settings = _requested(overrides, fields, CHOSEN if of_file else ())
    uri, root = run_changes.get("tracking_uri"), local_root(storage)
    if of_file:
        word = str(imported(word, run_changes, storage))
        run_changes = {k: v for k, v in run_changes.items() if k.split(".")[0] not in CHOSEN}
    file = checkpoint_file(word, which, root, uri)
    saved = load(file)
    config = validated(RunConfig, override(saved.run.model_dump(mode="json"), run_changes))
    contract = contract_of(config)
    trained = contract_of(config.model_copy(update={"threat": saved.run.threat}))
    if contract != trained and not another_contract:
        raise RequestError(
            f"threat: the network was trained for {trained.text}; expected the same, or "
            "--another-contract, which labels the numbers as those of another threat model"
        )
    store = tracking_uri(config.tracking_uri)  # refused before the work, if it names no store
    part, _ = open_test(config.data, local_context("cpu"))
    count = min(part.num_images, settings.images or part.num_images)
    pixels, labels = Selection(part.pixels, torch.arange(count)), part.labels[:count]
    scope = scope_of(file.stem, None if count == part.num_images else count, contract, trained)
    folder = file.parent / FOLDER / scope
    key = {
        "weights": saved.fingerprint,
        "images": digest(pixels, labels),
        "contract": contract.hash,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "attacks": EDITION,
        "versions": {name: version(name) for name in ("torch", "pyautoattack")},
    }
    with interruptible():
        log = ResultLog(folder / RESULT_LOG, key)
        with evaluator_pool(config, saved, settings) as pool:
            findings = pool.findings() if settings.checks else []
            results = run(settings, labels.numpy(), pool.run, log, watch)
            examples = examples_table(pool.attacked, results, config.threat)
        earlier = Earlier.of(folder, key)
        findings = earlier.with_findings([*findings, *findings_after(settings, results)])
        result = EvalResult(
            scope=scope,
            checkpoint=file.stem,
            accuracies=earlier.with_shares(accuracies(settings, results)),
            findings=tuple(findings),
            trusted=all(finding.passed for finding in findings),
            contract=RecordedContract.of(contract),
            same_contract=contract == trained,
            images=count,
            fe=log.fe,
            seconds=log.seconds,
            epoch=saved.epoch,
            hardware=hardware(),
            versions={name: version(name) for name in ("raytrain", "torch", "pyautoattack")},
            key=key,
            seed=settings.seed,
            file=file,
            folder=folder,
            run_id=run_id_of(file.parent),
            tracking_uri=store,
        )
        flags = earlier.with_flags(flags_table(settings, results))
        _write(result, flags, examples)
        if result.run_id is not None:
            seen = as_input(config.data, "test", pixels, labels)
            with own_tracker(config, root) as tracker:
                log_evaluation(tracker, result, result.run_id, seen)
    return result


# ------------------------------------------------------------------ the request


def _requested(
    overrides: Overrides, fields: Mapping[str, Any] | None = None, others: Sequence[str] = ()
) -> tuple[dict[str, Any], EvaluationSettings]:
    """The changes to the run, `others` included, and the settings of the evaluation."""
    given = overrides if isinstance(overrides, Mapping) else _read(overrides)
    changes = with_keywords(given, fields or {})
    own = {
        path: value for path, value in changes.items() if path in EvaluationSettings.model_fields
    }
    rest = {path: value for path, value in changes.items() if path not in own}
    for path in rest:
        if path.split(".")[0] not in (*_RUN_FIELDS, *others):
            raise RequestError(f"{path}: {_unknown(path)}")
    return rest, validated(EvaluationSettings, own)


def _unknown(path: str) -> str:
    """The refusal of a field that is neither of the evaluation nor one of the run that it may change."""
    own = list(EvaluationSettings.model_fields)
    hint = elsewhere(RunConfig, path.split(".")[-1], {}, _RUN_FIELDS)
    return (
        f"expected a field of the evaluation ({', '.join(own)}), or one of {', '.join(_RUN_FIELDS)} of the "
        f"run; the network is the run's own{hint or nearest(path, [*own, *_RUN_FIELDS])}"
    )


def _read(words: Iterable[str]) -> dict[str, Any]:
    words = [words] if isinstance(words, str) else list(words)
    own = [word for word in words if word.partition("=")[0] in EvaluationSettings.model_fields]
    of_run = parse_overrides(word for word in words if word not in own)
    return {**of_run, **parse_overrides(own, EvaluationSettings)}


# ------------------------------------------------------------------ the output


def _write(result: EvalResult, flags: pa.Table, examples: pa.Table) -> None:
    """Write the files of an evaluation, the record last, since it describes the others.

    Raises:
        TrainingFailed: if they cannot be written.
    """
    import pyarrow.parquet as pq

    values = result.model_dump(mode="json", include=set(EvaluationRecord.model_fields))
    text = json.dumps(values, indent=1)
    try:
        with atomic_writer(result.folder / FLAGS) as file:
            pq.write_table(flags.replace_schema_metadata({"raytrain": text}), file)
        with atomic_writer(result.folder / EXAMPLES) as file:
            pq.write_table(examples, file)
        push(result.folder)
        write_atomically(result.folder / RECORD, text)
    except OSError as error:
        raise TrainingFailed(
            f"{result.folder}: could not be written ({error.strerror or error})"
        ) from error


def log_evaluation(tracker: Tracker, result: EvalResult, run_id: str, seen: Input) -> None:
    """Log an evaluation, of the images `seen`, to its run in MLflow, if there is one."""
    failed = [finding.check for finding in result.failed] + Earlier.failed_beside(result.folder)
    if not tracker.has_run(run_id):
        log_line(
            f"raytrain: MLflow at {tracker.uri} has no run {run_id}: the numbers are only in "
            f"{result.folder}"
        )
        return
    tracker.adopt(run_id, run_id)
    tracker.inputs(run_id, [seen])
    tracker.log(run_id, result.metrics())
    if result.findings or failed:
        tracker.tag(run_id, {"checks": checks_tag(failed)})
    for name in (FLAGS, RECORD, EXAMPLES):
        tracker.artifact(run_id, result.folder / name, f"{FOLDER}/{result.scope}")
