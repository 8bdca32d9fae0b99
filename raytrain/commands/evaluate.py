"""`raytrain evaluate`: attacks on the test set, wherever they run, and the record they leave."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from raytrain.attacks.autoattack import EDITION
from raytrain.commands.train import Overrides, own_tracker
from raytrain.config.request import override, parse_overrides, validated
from raytrain.config.run import RunConfig
from raytrain.core.console import log_line
from raytrain.core.distributed_context import local_context
from raytrain.core.signals import interruptible
from raytrain.core.types import RequestError, TrainingFailed
from raytrain.data.loader import open_test
from raytrain.distributed.evaluator_pool import evaluator_pool
from raytrain.evaluation.checks import Finding
from raytrain.evaluation.confidence import Share
from raytrain.evaluation.contract import Contract
from raytrain.evaluation.examples import examples_table
from raytrain.evaluation.journal import Journal
from raytrain.evaluation.previous import FLAGS, RECORD, Earlier
from raytrain.evaluation.runner import Watch, run
from raytrain.evaluation.settings import EvaluationSettings
from raytrain.evaluation.table import accuracies, findings_after, flags_table
from raytrain.tracking import tracking_uri
from raytrain.tracking.checkpoint_lookup import checkpoint_file
from raytrain.tracking.data_sets import Input, as_input, digest
from raytrain.tracking.provenance import contract_of, hardware
from raytrain.training.checkpoint import load, run_id_of

_RUN_FIELDS = ("data", "threat", "tracking_uri", "device", "workers")
_RUN_FIELDS += ("cpus_per_worker", "gpus_per_worker", "max_failures")
EXAMPLES, JOURNAL = "examples.parquet", "verdicts.jsonl"


@dataclass(frozen=True)
class EvalResult:
    """An evaluation on the test set: `accuracies` has `clean` and every attack, weak to strong."""

    scope: str  # test or test_last; then how many images if not all, then another threat model
    accuracies: dict[str, Share]
    findings: list[Finding]
    contract: Contract
    same_contract: bool  # as the network was trained for
    images: int
    fe: int  # forward-equivalents that it cost
    seconds: float  # spent attacking, over all processes and launches
    epoch: int  # of the checkpoint
    checkpoint: Path
    folder: Path  # of flags.parquet, evaluation.json and examples.parquet
    run_id: str | None

    @property
    def trusted(self) -> bool:
        """Whether no check has failed."""
        return all(finding.passed for finding in self.findings)

    @property
    def strongest(self) -> str:
        """The attack that left least, of the ones that were asked for."""
        return min(self.attacks, key=lambda name: self.accuracies[name].value)

    @property
    def attacks(self) -> list[str]:
        """All names but `clean`."""
        return [name for name in self.accuracies if name != "clean"]

    def json(self) -> dict[str, Any]:
        """Plain values, for `--json` and `evaluation.json`."""
        return {
            **self.record(),
            "checkpoint": str(self.checkpoint),
            "folder": str(self.folder),
            "run_id": self.run_id,
        }

    def record(self) -> dict[str, Any]:
        """What is kept of it: nothing about this machine's folders."""
        return {
            "scope": self.scope,
            "checkpoint": self.checkpoint.stem,
            "epoch": self.epoch,
            "contract": self.contract.json(),
            "same_contract": self.same_contract,
            "images": self.images,
            "accuracies": {name: asdict(share) for name, share in self.accuracies.items()},
            "findings": [asdict(finding) for finding in self.findings],
            "trusted": self.trusted,
            "fe": self.fe,
            "seconds": self.seconds,
            "hardware": hardware(),
            "versions": {name: version(name) for name in ("raytrain", "torch", "pyautoattack")},
        }


def evaluate(
    run_or_checkpoint: str | Path,
    overrides: Overrides = (),
    *,
    which: str | None = None,
    another_contract: bool = False,
    storage: Path = Path("runs"),
    watch: Watch | None = None,
) -> EvalResult:
    """Attack a network on the test set, image by image, and record it on the run it belongs to.

    `run_or_checkpoint` is the id of a run, a checkpoint folder or a checkpoint file; `which`
    picks one of a run's checkpoints, `best` or `last`, the best one that there is if not given.
    `overrides` are fields of `EvaluationSettings` (`attacks=pgd,aa`, `steps=50`), or `data.*`, `workers`,
    `device` and `tracking_uri` of the run; with `another_contract` also `threat.*`, and the
    numbers are labelled so. Work that an interrupted evaluation has done is not done again. With
    several workers, or RAY_ADDRESS, images are shared out among processes.

    Raises:
        RequestError: if there is no such run, or the request does not fit it.
        TrainingFailed: if the result cannot be written.
    """
    run_changes, exam = _wanted(overrides)
    file = checkpoint_file(str(run_or_checkpoint), which, storage, run_changes.get("tracking_uri"))
    saved = load(file)
    config = validated(RunConfig, override(saved.run.model_dump(mode="json"), run_changes))
    contract = contract_of(config)
    trained = contract_of(config.model_copy(update={"threat": saved.run.threat}))
    if contract != trained and not another_contract:
        raise RequestError(
            f"threat: the network was trained for {trained.text}; expected the same, or "
            "--another-contract, which labels the numbers as those of another threat model"
        )
    tracking_uri(config.tracking_uri)  # refused before the work, if it names no store
    part, _ = open_test(config.data, local_context("cpu"))
    count = min(part.num_images, exam.images or part.num_images)
    pixels, labels = part.pixels[:count], part.labels[:count]
    scope = _scope(file, None if count == part.num_images else count, contract, trained)
    folder = file.parent / "evaluation" / scope
    key = {
        "weights": saved.fingerprint,
        "images": digest(pixels, labels),
        "contract": contract.hash,
        "batch_size": exam.batch_size,
        "seed": exam.seed,
        "attacks": EDITION,
        "versions": {name: version(name) for name in ("torch", "pyautoattack")},
    }
    with interruptible():
        journal = Journal(folder / JOURNAL, key)
        with evaluator_pool(config, saved, exam) as pool:
            findings = pool.findings() if exam.checks else []
            verdicts = run(exam, labels.numpy(), pool.examine, journal, watch)
            examples = examples_table(pool.attacked, verdicts, config.threat)
        earlier = Earlier.of(folder, key)
        result = EvalResult(
            scope=scope,
            accuracies=earlier.with_shares(accuracies(exam, verdicts)),
            findings=earlier.with_findings([*findings, *findings_after(exam, verdicts)]),
            contract=contract,
            same_contract=contract == trained,
            images=count,
            fe=journal.fe,
            seconds=journal.seconds,
            epoch=saved.epoch,
            checkpoint=file,
            folder=folder,
            run_id=run_id_of(file.parent),
        )
        flags = earlier.with_flags(flags_table(exam, verdicts))
        _leave(result, {"key": key, "seed": exam.seed}, flags, examples)
        if result.run_id is not None:
            seen = as_input(config.data, "test", pixels, labels)
            _record(result, config, result.run_id, storage, seen)
    return result


# ------------------------------------------------------------------ what is asked


def _wanted(overrides: Overrides) -> tuple[dict[str, Any], EvaluationSettings]:
    """The changes to the run, and the exam."""
    changes = overrides if isinstance(overrides, Mapping) else _read(overrides)
    own = {
        path: value for path, value in changes.items() if path in EvaluationSettings.model_fields
    }
    rest = {path: value for path, value in changes.items() if path not in own}
    for path in rest:
        if path.split(".")[0] not in _RUN_FIELDS:
            fields = ", ".join(EvaluationSettings.model_fields)
            raise RequestError(
                f"{path}: expected a field of the evaluation ({fields}), or one of "
                f"{', '.join(_RUN_FIELDS)} of the run; the network is the run's own"
            )
    return rest, validated(EvaluationSettings, own)


def _read(words: Iterable[str]) -> dict[str, Any]:
    words = list(words)
    own = [word for word in words if word.partition("=")[0] in EvaluationSettings.model_fields]
    of_run = parse_overrides(word for word in words if word not in own)
    return {**of_run, **parse_overrides(own, EvaluationSettings)}


def _scope(file: Path, images: int | None, contract: Contract, trained: Contract) -> str:
    """What metrics and files of an evaluation are named after: `test_last_1000_linf-0.1` has it all."""
    of = "test_last" if file.stem == "last" else "test"
    some = "" if images is None else f"_{images}"
    other = "" if contract == trained else f"_{contract.norm}-{contract.eps:g}"
    return of + some + other


# ------------------------------------------------------------------ what is left


def _leave(
    result: EvalResult, more: Mapping[str, Any], flags: pa.Table, examples: pa.Table
) -> None:
    """The files of an evaluation; the record last, since it says what the others are of.

    Raises:
        TrainingFailed: if they cannot be written.
    """
    import pyarrow.parquet as pq

    text = json.dumps({**result.record(), **more}, indent=1)
    try:
        pq.write_table(flags.replace_schema_metadata({"raytrain": text}), result.folder / FLAGS)
        pq.write_table(examples, result.folder / EXAMPLES)
        (result.folder / RECORD).write_text(text)
    except OSError as error:
        raise TrainingFailed(
            f"{result.folder}: could not be written ({error.strerror or error})"
        ) from error


def _record(
    result: EvalResult, config: RunConfig, run_id: str, storage: Path, seen: Input
) -> None:
    """The evaluation on its run in MLflow, if there is one."""
    shares = {f"{result.scope}/{name}": s.value for name, s in result.accuracies.items()}
    costs = {"images": float(result.images), "fe": float(result.fe), "seconds": result.seconds}
    failed = [finding.check for finding in result.findings if not finding.passed]
    failed += Earlier.failed_beside(result.folder)
    with own_tracker(config, storage) as tracker:
        if not tracker.knows(run_id):
            log_line(
                f"raytrain: MLflow at {tracker.uri} has no run {run_id}: the numbers are only in "
                f"{result.folder}"
            )
            return
        tracker.adopt(run_id, run_id)
        tracker.inputs(run_id, [seen])
        tracker.log(run_id, {**shares, **{f"{result.scope}/{k}": v for k, v in costs.items()}})
        if result.findings or failed:
            tracker.tag(run_id, {"checks": f"FAILED: {', '.join(failed)}" if failed else "passed"})
        for name in (FLAGS, RECORD, EXAMPLES):
            tracker.artifact(run_id, result.folder / name, f"evaluation/{result.scope}")
