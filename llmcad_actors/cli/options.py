"""The options that several commands share, what they say together, and the job that they describe."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcad_actors.cli.demo import demo_to_run
from llmcad_actors.cli.notices import tell
from llmcad_actors.config import BUILDERS, FALLBACKS, READINGS, EngineConfig, read_config
from llmcad_actors.core.checks import check_text
from llmcad_actors.errors import ConfigError
from llmcad_actors.families.generation_rules import SAMPLING
from llmcad_actors.plan.shorthand import DEMO_MEMORY, MEMORY, spelled_out
from llmcad_actors.tools.bundled import DEMO

if TYPE_CHECKING:
    from llmcad_actors.plan.job import Prepared

MOST_THREADS = 1024

MODEL = "Model"
OUTPUT = "Output"
CHOOSING = "Choosing tokens"
RESOURCES = "Memory, disk and cores"
SPECULATION = "Speculation"
COMPARISON = "Other ways to draft, for comparison"
PANELS = (MODEL, OUTPUT, CHOOSING, RESOURCES, SPECULATION, COMPARISON)

_DEFAULTS = {field.name: field.default for field in fields(EngineConfig)}


def _option(*names: str, panel: str, text: str, default: object = None, **more: Any) -> Any:
    """default: what is shown as such, of an option that is None unless given."""
    shown = "" if default is None else f" [dim]\\[default: {default}][/dim]"
    return typer.Option(*names, help=text + shown, rich_help_panel=panel, **more)


Target = Annotated[
    str | None,
    _option(
        panel=MODEL,
        text="Model to run: a Hugging Face directory, a name in the local cache, or `demo`, the bundled one.",
        default=DEMO,
    ),
]
Draft = Annotated[
    str | None,
    _option(
        panel=MODEL,
        text="Small model with the same tokenizer: directory or name; `none`: no draft, one token a pass.",
        default="none; the bundled one for the demo",
    ),
]
Dtype = Annotated[
    str | None,
    _option(
        panel=MODEL,
        text="Compute in: auto (float32, around the weights as stored), float32, bfloat16.",
        default=_DEFAULTS["dtype"],
    ),
]
ConfigFile = Annotated[
    Path | None, _option("--config", panel=MODEL, text="YAML file of settings; options win over it.")
]
Memory = Annotated[
    str | None,
    _option(
        panel=RESOURCES,
        text="Cap on all that is used: 1.5GB, 512MiB, 75% of RAM.",
        default=f"{MEMORY}; {DEMO_MEMORY} for the demo",
    ),
]
MaxContext = Annotated[
    int | None,
    _option(panel=RESOURCES, text="Tokens of prompt and output to plan for.", default="the model's, 2048 at most"),
]
ReadLimit = Annotated[
    str | None, _option(panel=RESOURCES, text="Hold the disk reads to a rate, such as 400MB/s.", default="none")
]
Threads = Annotated[
    int | None,
    _option(panel=RESOURCES, text="Threads that compute the target.", default="the cores", min=1, max=MOST_THREADS),
]
DraftThreads = Annotated[
    int | None,
    _option(
        panel=RESOURCES,
        text="Threads that compute the draft.",
        default="1 for a small draft, else the cores",
        min=1,
        max=MOST_THREADS,
    ),
]
PlainRay = Annotated[
    bool | None,
    _option(
        "--plain-ray",
        panel=RESOURCES,
        text="Start Ray as it comes, with more memory: where a new version of Ray does not start otherwise.",
    ),
]
MaxNodes = Annotated[
    int | None,
    _option(panel=SPECULATION, text="Tree nodes checked in one pass at most.", default="128, more where they are free"),
]
ProvisionalGrowth = Annotated[
    bool | None, _option(panel=SPECULATION, text="Go on drafting while a pass runs.", default="on")
]
Sharpening = Annotated[
    bool | None,
    _option(
        panel=SPECULATION,
        text="Of best-first: learn how much more certain the target is than the draft.",
        default="on",
    ),
]
Builder = Annotated[
    str | None,
    _option(panel=COMPARISON, text=f"How the tree grows: {', '.join(BUILDERS)}.", default=_DEFAULTS["builder"]),
]
Fallback = Annotated[
    str | None,
    _option(
        panel=COMPARISON, text=f"When the draft hands over: {', '.join(FALLBACKS)}.", default=_DEFAULTS["fallback"]
    ),
]
Depth = Annotated[
    int | None, _option(panel=COMPARISON, text="Of fixed-depth: tokens drafted in a row.", default=_DEFAULTS["depth"])
]
Widths = Annotated[
    str | None,
    _option(
        panel=COMPARISON,
        text="Of fixed-tree: children at each level.",
        default=str(_DEFAULTS["widths"]).strip("()").replace(" ", ""),
    ),
]
Alpha = Annotated[
    float | None,
    _option(
        panel=COMPARISON,
        text="Of adaptive: the first threshold of cumulative confidence.",
        default=_DEFAULTS["alpha"],
    ),
]
AlphaUpdate = Annotated[
    str | None,
    _option(
        panel=COMPARISON,
        text=f"Of adaptive: how the threshold follows verdicts: {', '.join(READINGS)}.",
        default=_DEFAULTS["alpha_update"],
    ),
]
Threshold = Annotated[
    float | None,
    _option(panel=COMPARISON, text="Of token-confidence: hand over below it.", default=_DEFAULTS["threshold"]),
]

MaxNewTokens = Annotated[int, _option(panel=OUTPUT, text="Tokens to generate at most.", min=1)]
Stop = Annotated[
    list[str] | None, _option(panel=OUTPUT, text="End the text before this string; may be repeated.", default="none")
]
Chat = Annotated[bool, _option("--chat", panel=OUTPUT, text="Put the model's chat template around the text.")]
AsJson = Annotated[
    bool, _option("--json", panel=OUTPUT, text="One JSON object as the last line; nothing else on standard output.")
]
Quiet = Annotated[
    bool, _option("--quiet", "-q", panel=OUTPUT, text="No status line while it runs, no summary at the end.")
]
CheckLossless = Annotated[
    bool,
    _option(
        "--check-lossless",
        panel=OUTPUT,
        text="Decode again without the draft, and compare; exit code 1 where the texts differ.",
    ),
]
TraceFile = Annotated[
    Path | None, _option("--trace", panel=OUTPUT, text="Write what every part does to this file; see `llmcad trace`.")
]

Temperature = Annotated[
    float | None,
    _option(panel=CHOOSING, text="Above 0: draw tokens from the target's distribution.", default="0: none is drawn"),
]
TopK = Annotated[int | None, _option(panel=CHOOSING, text="Draw among the k most probable tokens.", default="all")]
TopP = Annotated[
    float | None,
    _option(panel=CHOOSING, text="Draw among the likeliest tokens that have p of the probability.", default="1: all"),
]
MinP = Annotated[
    float | None,
    _option(panel=CHOOSING, text="Draw among tokens at least so likely as a share of the likeliest.", default="0: all"),
]
Seed = Annotated[
    int | None, _option(panel=CHOOSING, text="Of the draws: the same one gives the same text.", default="any")
]
Sample = Annotated[
    bool, _option("--sample", panel=CHOOSING, text="Draw as the model's generation config says, where it says so.")
]
RepetitionPenalty = Annotated[
    float | None, _option(panel=CHOOSING, text="Above 1: less of what was said, as transformers has it.", default="1")
]
PresencePenalty = Annotated[
    float | None, _option(panel=CHOOSING, text="Off the logits of tokens that the output has.", default="0")
]
FrequencyPenalty = Annotated[
    float | None, _option(panel=CHOOSING, text="Off them for each time that it has them.", default="0")
]
LogitBias = Annotated[
    list[str] | None,
    _option(panel=CHOOSING, text="Add to a token's logit: ID=NUMBER; may be repeated.", default="none"),
]
LogProbs = Annotated[
    int | None,
    _option("--logprobs", panel=CHOOSING, text="With --json: every token's log-probability, and of N others."),
]
MaxRequests = Annotated[
    int | None,
    _option(panel=RESOURCES, text="Requests that share passes, as far as there is room.", default="8", min=1),
]

BELONGS_TO: dict[str, tuple[str, tuple[str, ...]]] = {
    "depth": ("fallback", ("fixed-depth",)),
    "widths": ("fallback", ("fixed-tree",)),
    "alpha": ("fallback", ("adaptive",)),
    "alpha_update": ("fallback", ("adaptive",)),
    "threshold": ("fallback", ("token-confidence",)),
    "builder": ("fallback", tuple(name for name in FALLBACKS if name not in ("fixed-depth", "fixed-tree"))),
    "sharpen": ("builder", ("best-first",)),
}
"""Settings that do something only beside certain values of another one."""

OF_A_DRAFT = (*BELONGS_TO, "fallback", "provisional", "draft_threads")


def choices_from_options(
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    sample: Sample = False,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    logit_bias: LogitBias = None,
    logprobs: LogProbs = None,
) -> dict[str, Any]:
    """What was given, as options of a request."""
    given = {name: value for name, value in locals().items() if value is not None and value is not False}
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(parse_bias, given["logit_bias"]))
    return given


def unsampled(job: "Prepared", choices: Mapping[str, Any]) -> list[str]:
    """What is said where the model would rather be sampled."""
    asked = {name: value for name, value in job.sampling.items() if SAMPLING[name] != value or name == "temperature"}
    if not asked or "sample" in choices or "temperature" in choices:
        return []
    settings = ", ".join(f"{name} {value}" for name, value in asked.items())
    return [
        f"the model's generation config samples ({settings}), and this run takes the most probable tokens; --sample "
        "does as the config says, --temperature 0 says that this is meant"
    ]


def parse_bias(text: str) -> tuple[int, float]:
    """ "17=-2.5" -> (17, -2.5); raises `ConfigError`."""
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        raise ConfigError(f"logit_bias: {text[:200]!r} must be a token's id and a number, such as 17=-2.5") from None


MakeDemo = Callable[[ExitStack], Path]
"""Gives the demo's target, for as long as the stack is open."""


def takes_job(command: Callable[..., None], make_demo: MakeDemo = demo_to_run) -> Callable[..., None]:
    """The command's first parameter is made from the options that all such commands share.

    It is `job`, the checked job; or `make_job`, which makes it, for a command that has something to look at before. One
    called `choices` becomes the options that say how tokens are chosen.
    """
    shared = inspect.signature(settings_from_options).parameters
    first, *own = inspect.signature(command).parameters.values()
    chooses = any(parameter.name == "choices" for parameter in own)
    own = [parameter for parameter in own if parameter.name != "choices"]
    choosing = inspect.signature(choices_from_options).parameters if chooses else {}

    @functools.wraps(command)
    def run(**options: Any) -> None:
        given = {name: options.pop(name) for name in shared}
        if chooses:
            options["choices"] = choices_from_options(**{name: options.pop(name) for name in choosing})
        with ExitStack() as stack:

            def make_job() -> "Prepared":
                return job_of(settings_from_options(**given), lambda: make_demo(stack))

            command(make_job if first.name == "make_job" else make_job(), **options)

    parameters = sorted((*own, *choosing.values(), *shared.values()), key=_place_in_help)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _place_in_help(parameter: inspect.Parameter) -> int:
    """Arguments, then the options in the order of their panels."""
    (details,) = parameter.annotation.__metadata__
    return PANELS.index(details.rich_help_panel) if details.rich_help_panel else -1


def settings_from_options(
    target: Target = None,
    draft: Draft = None,
    dtype: Dtype = None,
    config: ConfigFile = None,
    memory: Memory = None,
    max_context: MaxContext = None,
    max_requests: MaxRequests = None,
    read_limit: ReadLimit = None,
    threads: Threads = None,
    draft_threads: DraftThreads = None,
    plain_ray: PlainRay = None,
    max_nodes: MaxNodes = None,
    provisional: ProvisionalGrowth = None,
    sharpen: Sharpening = None,
    builder: Builder = None,
    fallback: Fallback = None,
    depth: Depth = None,
    widths: Widths = None,
    alpha: Alpha = None,
    alpha_update: AlphaUpdate = None,
    threshold: Threshold = None,
) -> dict[str, Any]:
    """What was given, as settings of the engine: options win over the configuration file."""
    options = {name: value for name, value in locals().items() if value is not None and name != "config"}
    for name, value in options.items():
        if isinstance(value, str):
            check_text(value, f"--{name.replace('_', '-')}")
    if "widths" in options:
        options["widths"] = parse_widths(options["widths"])
    return (read_config(config) if config else {}) | options


def job_of(given: Mapping[str, Any], make_demo: Callable[[], Path]) -> "Prepared":
    """The checked job that the settings describe; what should be known of it is said."""
    from llmcad_actors.plan.prepare import prepare  # here: help needs neither numpy nor tokenizers

    job = prepare(spelled_out(EngineConfig(**{"target": DEMO, **given}), make_demo))
    tell([*without_draft(given, job), *without_effect(given, job), *job.notices])
    return job


def parse_widths(text: str) -> tuple[int, ...]:
    """ "1,1,3" -> (1, 1, 3); raises `ConfigError`."""
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise ConfigError(
            f"widths: {text[:200]!r} must be whole numbers with commas between them, such as 1,1,3,1"
        ) from None


def without_draft(given: Mapping[str, Any], job: "Prepared") -> Iterator[str]:
    """What is said where no draft was asked for, nor refused."""
    if job.draft is None and "draft" not in given:
        yield (
            f"no draft for {job.target.path.name}: it decodes plainly, one token a pass; --draft MODEL (a small model "
            "with the same tokenizer) is faster, --draft none says that this is meant"
        )


def without_effect(given: Mapping[str, Any], job: "Prepared") -> Iterator[str]:
    """A line for each setting that was given and changes nothing."""
    for name in sorted(set(given) & set(OF_A_DRAFT)):
        option = f"--{'no-' if given[name] is False else ''}{name.replace('_', '-')}"
        if job.draft is None:
            yield f"{option} has no effect without a draft; give one with --draft"
        elif wanted := _missing_for(name, job.config):
            yield f"{option} has no effect: {wanted}"


def _missing_for(name: str, config: EngineConfig) -> str:
    """ "it belongs to --fallback fixed-depth, and the fallback is marginal"; empty where nothing is missing."""
    while name in BELONGS_TO:
        name, values = BELONGS_TO[name]
        if (found := getattr(config, name)) not in values:
            return f"it belongs to --{name} {' or '.join(values)}, and the {name} is {found}"
    return ""
