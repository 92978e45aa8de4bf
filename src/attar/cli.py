"""The command line: one thin command per verb. stdout is data, stderr is for people."""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attar
from attar.config import Option, build_config, options
from attar.errors import AttarError, BudgetNotReached, UsageError
from attar.stages import STAGES

EXAMPLES = {
    "run": """examples:
  attar run photos/                                          learn a model from the photos themselves
  attar run photos/ --model hf:facebook/dinov2-small         start from a pretrained model (hub id or folder)
  attar run images/ --model net.py:resnet56 --weights net.safetensors --budget "latency<=0.5x, agreement>=0.98" --minutes 15
  attar run images/ --labels folders                         also judge with labels (never learn from them)""",
    "compress": """examples:
  attar compress attar-runs/photos                           goes on from what is done there; flags change its settings
  attar compress --model net.py:resnet56 --weights net.safetensors --data images/ --budget "macs<=0.5x" --minutes 15
  attar compress --model hf:FOLDER --data images/ --budget "latency<=0.33x, agreement>=0.98" --out small
  attar compress --model teacher.onnx --mean 0.5 --std 0.25 --data images/ --student net.py:small

without RUN, the model alone is wanted: a run folder (--out, by default attar-runs/NAME) is taken to the small model, its card and
its certificate. Exit code 3: the budget was not met, the best found is saved.""",
    "augment": """examples:
  attar augment attar-runs/photos                            goes on from what is done there; flags change its settings
  attar augment search attar-runs/photos                     ranks policies instead: see attar augment search --help""",
    "augment search": """examples:
  attar augment search attar-runs/photos --minutes 20
  attar augment search attar-runs/photos --data photos/      a run folder that does not exist yet
  attar run photos/ --policy attar-runs/photos/search/policy.json

The run folder follows the word search: `attar augment search` alone is the stage augment of a run folder of that name.""",
    "clusters": """examples:
  attar clusters attar-runs/photos                           number, name, items, medoid and border items of each cluster
  attar clusters attar-runs/photos --links sorted/           a folder of symbolic links per cluster, the most typical first
  attar clusters attar-runs/photos --table clusters.csv      every item: path, cluster, name, distance, outlier, next cluster, margin""",
    "duplicates": """examples:
  attar duplicates photos/                                   equal, encoded again, scaled, brighter or mirrored pictures
  attar duplicates photos/ --parts --table twice.csv         parts of pictures as well""",
    "leaks": """examples:
  attar leaks test/ train/                                   which pictures of test/ are in train/ as well
  attar leaks attar-runs/new attar-runs/old --table leaks.csv""",
    "name": 'example:\n  attar name attar-runs/photos 7 "sneakers"        "" takes the name away',
    "objects": """examples:
  attar objects attar-runs/photos                            the model of the run, or --model hf:FOLDER-OR-HUB-ID
  attar objects attar-runs/photos --data photos/             a run folder that does not exist yet
  attar objects attar-runs/cells --objects-side 640          finer: smaller objects, more time""",
    "init": "example:\n  attar init && attar run photos/        settings in ./attar.toml are picked up",
    "status": "example:\n  attar status attar-runs/photos",
    "predict": "example:\n  attar predict attar-runs/photos/model new/*.jpg --json",
}
LAST_SECTION = {"scan": "data", "augment": "generate", "export": "evaluate", "report": "evaluate"}
"""The last section of the settings a stage depends on, where it has another name than the stage."""
FOUND_BY = ("objects",)
"""The sections of the settings that objects depend on, besides those of embed."""
SEARCHED = ("setup", "data", "search")
"""The sections of the settings a search depends on."""
SHORTER = {"search_minutes": ("--minutes",)}
"""Other names of a flag, where no other setting of the verb has them."""
INTERRUPTED = 130


def _example(stage: str) -> str:
    return f"example:\n  attar {stage} attar-runs/photos        goes on from what is done there; flags change its settings"


def _up_to(last: str) -> list[str]:
    """The sections of the settings up to one."""
    sections = list(dict.fromkeys(option.section for option in options().values()))
    return sections[: sections.index(last) + 1]


def _add_settings(parser: argparse.ArgumentParser, skip: str, sections: Sequence[str]) -> None:
    """A flag for every setting of some sections; absent flags stay absent, so that files and defaults apply."""
    groups: dict[str, Any] = {}
    for option in options().values():
        if option.name == skip or option.section not in sections:
            continue
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(f"[{option.section}]")
        shown = "" if option.default in (None, "") else f" (default: {option.default})"
        flags, text = [f"--{option.name.replace('_', '-')}", *SHORTER.get(option.name, ())], option.text.replace("%", "%%") + shown
        extra = {"nargs": "+"} if _is_tuple(option) else {}
        groups[option.section].add_argument(
            *flags, dest=option.name, default=argparse.SUPPRESS, help=text, metavar=option.name.upper(), **extra
        )
    parser.add_argument("--config", metavar="FILE", help="settings file (default: ./attar.toml where there is one; attar init writes it)")


def _is_tuple(option: Option) -> bool:
    return any(typing.get_origin(kind) is tuple for kind in typing.get_args(option.type))


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; docs/cli.md is made from it."""
    parser = argparse.ArgumentParser(prog="attar", description="Unlabelled data in, a small fast model out, with proof.")
    parser.add_argument("--version", action="version", version=f"attar {attar.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(verb: str, text: str, epilog: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            verb, help=text, description=f"attar {verb}: {text}.", epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
        return made

    run = add("run", "everything, from a folder of items to a small model and its report", EXAMPLES["run"])
    run.add_argument("data", nargs="?", default=argparse.SUPPRESS, metavar="DATA", help=options()["data"].text)
    _add_settings(run, skip="data", sections=_up_to("evaluate"))
    run.add_argument("--quiet", action="store_true", help="no progress on stderr")
    for stage, text in STAGES.items():
        made, alone = add(stage, text, EXAMPLES.get(stage) or _example(stage)), stage == "compress"
        made.add_argument("run", nargs="?" if alone else None, metavar="RUN", help="run folder; a new one needs --data")
        _add_settings(made, skip="" if alone else "out", sections=_up_to(LAST_SECTION.get(stage, stage)))
        made.add_argument("--quiet", action="store_true", help="no progress on stderr")
    found = add("objects", "find objects in the images: boxes, masks and kinds, as COCO JSON", EXAMPLES["objects"])
    found.add_argument("run", metavar="RUN", help="run folder; a new one needs --data")
    _add_settings(found, skip="out", sections=[*_up_to("embed"), *FOUND_BY])
    found.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add("status", "what is done in a run folder", EXAMPLES["status"]).add_argument("run", metavar="RUN", help="run folder")
    listed = add("clusters", "what is in each cluster: a list, folders of links, a table", EXAMPLES["clusters"])
    listed.add_argument("run", metavar="RUN", help="run folder")
    listed.add_argument(
        "--links", metavar="FOLDER", help="folder to make, with links to the items, by cluster; an existing one is never touched"
    )
    listed.add_argument("--table", metavar="FILE", help="CSV file to write; an existing one is never touched")
    twice = add("duplicates", "the same picture twice in some data: groups, and which one to keep", EXAMPLES["duplicates"])
    twice.add_argument("data", metavar="DATA", help="a folder, glob, list file, archive, Parquet file, or a run folder")
    leaked = add("leaks", "pictures of some data that are in other data as well", EXAMPLES["leaks"])
    leaked.add_argument("data", metavar="DATA", help="the data to judge, such as a test folder; or a run folder")
    leaked.add_argument(
        "against", metavar="AGAINST", help="the data they may have leaked from, such as the training folder; or a run folder"
    )
    for made in (twice, leaked):
        made.add_argument("--likeness", type=float, default=0.85, help="smallest likeness in detail, 0.5 to 1 (default: 0.85)")
        made.add_argument("--no-mirrored", dest="mirrored", action="store_false", help="mirror images are not the same picture")
        made.add_argument(
            "--parts", action="store_true", help="a part of a picture, of 0.7 to 0.95 of its sides, is the same picture; slower"
        )
        made.add_argument("--table", metavar="FILE", help="CSV file to write; an existing one is never touched")
        made.add_argument("--workers", type=int, default=2, help="threads (default: 2)")
        made.add_argument("--max-megapixels", type=float, default=100.0, help="larger pictures are left out (default: 100)")
        made.add_argument("--quiet", action="store_true", help="no progress on stderr")
    named = add("name", "name a cluster; the name is kept, and shown in the report, by predict and in tables", EXAMPLES["name"])
    named.add_argument("run", metavar="RUN", help="run folder")
    named.add_argument("cluster", type=int, metavar="CLUSTER", help="its number")
    named.add_argument("name", metavar="NAME", help='its name; "" takes it away')
    named.add_argument("--quiet", action="store_true", help="no progress on stderr")
    predict = add("predict", "cluster and class of images, by the small model", EXAMPLES["predict"])
    predict.add_argument("model", metavar="MODEL", help="RUN/model, or an .onnx file attar made")
    predict.add_argument("files", nargs="+", metavar="FILE", help="images or folders")
    predict.add_argument("--threads", type=int, default=1, help="threads of the model (default: 1)")
    init = add("init", "write a commented attar.toml with every setting", EXAMPLES["init"])
    init.add_argument("path", nargs="?", default="attar.toml", help="file to write; an existing one is never touched")
    return parser


def make_search_parser() -> argparse.ArgumentParser:
    """The command line of `attar augment search RUN`, which is no verb of its own: `attar augment search` stays the stage of that folder."""
    verb, text = "augment search", "rank augmentation policies on the data, without labels"
    parser = argparse.ArgumentParser(
        prog=f"attar {verb}",
        description=f"attar {verb}: {text}.",
        epilog=EXAMPLES[verb],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=verb)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("run", metavar="RUN", help="run folder; a new one needs --data")
    _add_settings(parser, skip="out", sections=SEARCHED)
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The command; two words after `augment`, the first of them `search`, are a search in the second."""
    searches = list(words[:2]) == ["augment", "search"] and len(words) > 2
    if searches and (words[2] in ("-h", "--help") or not words[2].startswith("-")):
        return make_search_parser().parse_args(words[2:])
    return make_parser().parse_args(words)


def _settings(given: argparse.Namespace) -> tuple[dict[str, Any], Path | None]:
    """Flags by setting name, and the settings file that applies."""
    flags = {name: value for name, value in vars(given).items() if name in options()}
    file = Path(given.config) if given.config else Path("attar.toml") if Path("attar.toml").is_file() else None
    if file and not given.config and not given.quiet:
        print(f"attar: settings from {file}", file=sys.stderr)
    return flags, file


def _print(value: Any, as_json: bool, text: str) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str) if as_json else text)


def _run(given: argparse.Namespace) -> None:
    flags, file = _settings(given)
    config = build_config(flags, file)
    from attar.pipeline import run_config  # heavy: torch and the stages

    try:
        result, missed = run_config(config, quiet=given.quiet), None
    except BudgetNotReached as error:
        result, missed = error.run, error
    report = result.root / "report.html"
    body: dict[str, Any] = {"run": str(result.root), "report": str(report), "model": str(result.root / "model"), "result": result.sentence}
    body |= {"budget_met": missed is None, "stages_run": result.ran, "figures": [figure._asdict() for figure in result["evaluate"].figures]}
    _print(body, given.json, f"{result.sentence}\nReport: {report}")
    if missed:
        raise missed


def _compress(given: argparse.Namespace) -> None:
    """A run folder to the stage compress; without one, a model and data to the delivered file."""
    if given.run is not None:
        if hasattr(given, "out"):
            raise UsageError(f"out: {given.out}: RUN ({given.run}) is the folder already; give one of the two")
        _stage(given)
        return
    flags, file = _settings(given)
    config = build_config(flags, file)
    from attar.pipeline import run_config
    from attar.stages.report.result import sentence

    try:
        run, missed = run_config(config, until="export", quiet=given.quiet), None
    except BudgetNotReached as error:
        run, missed = error.run, error
    front, evidence = run["compress"], run["evaluate"]
    said, certificate, model = sentence(front, evidence, bool(front.original.model.classes)), evidence.certificate, run.root / "model"
    body: dict[str, Any] = {"run": str(run.root), "model": str(model), "result": said, "budget_met": missed is None, "reason": front.reason}
    body |= {"certificate": str(certificate), "per_cluster": certificate.per_cluster, "chosen": front.chosen}
    made = [{"name": one.name, "precision": one.precision, "runtime": one.runtime, **one.figures} for one in front.candidates]
    body |= {"candidates": made}
    _print(body, given.json, f"{said}\nCertificate: {certificate}\nModel: {model / 'student.onnx'}")
    if missed:
        raise missed


def _stage(given: argparse.Namespace) -> None:
    flags, file = _settings(given)
    from attar.pipeline import continue_config, run_config
    from attar.workspace import status

    missed = None
    try:
        run_config(continue_config(given.run, flags, file), until=given.verb, quiet=given.quiet)
    except BudgetNotReached as error:
        missed = error
    row = next(row for row in status(given.run)["stages"] if row["stage"] == given.verb)
    _print(row, given.json, "\n".join([f"{given.verb}: {row['state']}, {row['seconds']} s", *row["notes"]]))
    if missed:
        raise missed


def _search(given: argparse.Namespace) -> None:
    flags, file = _settings(given)
    budgets = ("search_steps", "search_minutes")
    if sum(name in flags for name in budgets) == 1:  # takes the place of the other one of an earlier command
        flags = dict.fromkeys(budgets) | flags
    from attar.pipeline import continue_config
    from attar.stages.augment.search import listing, search_config

    found = search_config(continue_config(given.run, flags, file), quiet=given.quiet)
    policy = Path(given.run) / "search" / "policy.json"
    body = {"policy": str(policy), "verdict": found.verdict, "families": found.policy.families, "table": found.rows}
    _print(body, given.json, f"{listing(found.rows)}\n{found.verdict}\nPolicy: {policy}")


def _objects(given: argparse.Namespace) -> None:
    flags, file = _settings(given)
    found = attar.objects(given.run, config=file, quiet=given.quiet, **flags)
    home = Path(given.run) / "objects"
    body = {"coco": str(home / "objects.json"), "sheet": str(home / "sheet.png"), "objects": found.count, "method": found.method}
    sizes = ", ".join(f"kind {kind['kind'] + 1}: {kind['objects']}" for kind in found.kinds)
    text = f"{found.count} objects by {found.method}\n{sizes}\nCOCO: {body['coco']}\nPicture: {body['sheet']}"
    _print(body | {"kinds": found.kinds}, given.json, text)


def _status(given: argparse.Namespace) -> None:
    body = attar.status(given.run)
    lines = [
        f"{row['stage']:10} {row['state']:12} {'' if row['seconds'] is None else str(row['seconds']) + ' s'}".rstrip()
        for row in body["stages"]
    ]
    _print(body, given.json, "\n".join([f"{body['run']}: a run of {body['data']}", *lines, *filter(None, [body["result"]])]))


def _predict(given: argparse.Namespace) -> None:
    rows = attar.predict(given.model, given.files, threads=given.threads)
    lines = [
        "\t".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()) for row in rows
    ]
    _print(rows, given.json, "\n".join(lines))


def _clusters(given: argparse.Namespace) -> None:
    rows = attar.clusters(given.run, links=given.links, table=given.table)
    body = {"run": given.run, "clusters": rows, "links": given.links, "table": given.table}
    lines = [f"{row['cluster']:>4}  {row['name']:24} {row['items']:>9,} items  medoid {row['medoid']}" for row in rows]
    _print(body, given.json, "\n".join([*lines, *(f"wrote {path}" for path in (given.links, given.table) if path)]))


def _same(given: argparse.Namespace) -> None:
    """Duplicates and leaks."""
    names = ("data", "against", "likeness", "mirrored", "parts", "table", "workers", "max_megapixels", "quiet")
    rows = getattr(attar, given.verb)(**{name: value for name, value in vars(given).items() if name in names})
    lines = ["\t".join(str(value) for value in row.values()) for row in rows]
    _print(rows, given.json, "\n".join(["\t".join(rows[0]), *lines] if rows else []))


def _name(given: argparse.Namespace) -> None:
    names = attar.name(given.run, given.cluster, given.name, quiet=given.quiet)
    _print(names, given.json, "\n".join(f"{number:>4}  {name}" for number, name in names.items()))


def _init(given: argparse.Namespace) -> None:
    path = attar.init(given.path)
    _print({"path": str(path)}, given.json, f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 1 failed, 2 bad usage, 3 budget not reached, 130 interrupted."""
    given = _parse(sys.argv[1:] if arguments is None else arguments)
    verbs = {"run": _run, "compress": _compress, "augment search": _search, "objects": _objects, "status": _status}
    verbs |= {"duplicates": _same, "leaks": _same, "clusters": _clusters, "name": _name, "predict": _predict, "init": _init}
    try:
        verbs.get(given.verb, _stage)(given)
        sys.stdout.flush()
    except AttarError as error:
        print(f"attar: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nattar: interrupted; nothing is lost: the same command resumes where this one stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout went away (| head): not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"attar: {error.filename or 'operating system'}: {error.strerror}", file=sys.stderr)
        return AttarError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
