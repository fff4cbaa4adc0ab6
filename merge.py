"""What a client posts goes in; a `Run`, or every problem found, comes out.

Nothing here touches anything but its arguments: no environment, no clock, no network, no file.
Same input, same output. The rows of a CSV are read and judged once; a message is made when it is
asked for, one at a time, and shares with the default whatever it does not override.
"""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any

import orjson

type Json = dict[str, Any]

PARTS = "configtemplate", "data_job", "data_agent", "python_code", "requirements_txt", "configtune"
TASK = "tasks.consume_message"  # that agents' scripts register, and that jobs are sent to
_TARGETS = "targetted_job", "targetted_agent"  # the keys of a message that carry its index
RESERVED = "celery", "celeryev", "unacked"  # names that Celery and its brokers use themselves
MAX_PROBLEMS = 1000  # an answer lists as many; a file with more has one cause, not a thousand

_LABEL = '"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"'
_LABEL_IS = 'a DNS label in quotes (lower-case letters, digits and "-", at most 63 characters)'
_ABOVE_0 = r"(?=[0-9.]*[1-9])([0-9]+\.?[0-9]*|\.[0-9]+)"
# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
_QUANTITY = rf'"\+?{_ABOVE_0}([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{{1,2}})?"'
#: What the fields of run_message are: as JSON, and in words.
_FIELDS = {
    "run_id": (_LABEL, _LABEL_IS),
    "image_name": (_LABEL, _LABEL_IS),
    "image_version": ('"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"', "a Docker tag in quotes"),
    "agent_cpu": (_QUANTITY, 'a Kubernetes quantity above zero, in quotes, such as "500m"'),
    "agent_memory": (_QUANTITY, 'a Kubernetes quantity above zero, in quotes, such as "512Mi"'),
    "number_of_agents": ("[1-9][0-9]*", "an integer from 1, without quotes"),
    "number_of_jobs": ("[1-9][0-9]*", "an integer from 1, without quotes"),
    "job_time_limit": (rf"null|{_ABOVE_0}(e[+-][0-9]+)?", "a number of seconds above 0"),
    "only_jobs": (r"null|\[[0-9]+(?:, [0-9]+)*+\]", "a list of integers from 0, one at least"),
}
_OPTIONAL: Json = {"image_version": "latest", "agent_cpu": "500m", "agent_memory": "512Mi"}

# What is no text, and what no line of a CSV; a byte that is not UTF-8 has become a surrogate.
_NO_TEXT, _NO_LINE = re.compile("[\0\udc80-\udcff]"), re.compile("[\0\udc80-\udcff]|\r(?!\n)")
_MERGED = "the merged message (MAX_MESSAGE_BYTES)"
_SURROGATE = re.compile("[\ud800-\udfff]")
_CLOSED = 'text between a closing quote and a comma; inside quotes, write " as ""'
#: JSON read strictly; a number that is too large becomes an integer that is, for `walk`
_STRICT: Json = {
    "parse_constant": int,  # which knows none of them
    "parse_int": lambda digits: int(digits[:30]),
    "parse_float": lambda digits: value if math.isfinite(value := float(digits)) else 2**64,
}
_DECODER = json.JSONDecoder(**_STRICT)
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*+"|(NaN|-?Infinity)')
_INDEX = re.compile(r"[+-]?[0-9]{1,1000}")
_FIELD_STARTS = bytes.maketrans(b"123456789[\n", b"000000000{,")
_PIP_LINE, _PIP_JOINED = re.compile(r"(?:\\\r?\n|[^\n])++"), re.compile(r"\\\r?\n")
_PIP_ASIDE = re.compile(r"(^|\s)(#|--?[A-Za-z]).*")  # a comment, or options
_PIP_DIRECT = re.compile(r"[A-Za-z][\w+.-]*://|file:|~|[\w./-]+(/|\.whl|\.zip|\.tar\.|\.tgz)")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with what was posted, and where."""

    part: str
    message: str
    line: int | None = None  #: counted from 1, as an editor shows it
    column: int | None = None  #: counted from 1
    field: str | None = None
    status: int = 422  #: the HTTP status it calls for

    def __str__(self) -> str:
        where = (self.part, f"line {self.line}" if self.line else "", self.field or "")
        return f"{', '.join(filter(None, where))}: {self.message}"

    def as_json(self) -> Json:
        """The problem as the answer shows it, without what is not known."""
        names = ("part", "line", "column", "field", "message")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Invalid(Exception):
    """What was posted cannot be run. Carries every problem that was found."""

    def __init__(self, problems: list[Problem]) -> None:
        first = min(problems, key=lambda problem: problem.status)
        super().__init__(str(first))
        self.problems = problems
        self.status = first.status  #: 400: a part does not parse; else 413: too large; else 422


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may hold: settings of the orchestrator. Sizes in bytes of UTF-8."""

    max_agents: Annotated[int, "of one run"] = 10_000
    max_jobs: Annotated[int, "of one run"] = 1_000_000
    max_message_bytes: Annotated[int, "of one merged message"] = 8 * 2**20
    max_script_bytes: Annotated[int, "of one script"] = 2**20
    max_columns: Annotated[int, "of a CSV"] = 1000
    max_depth: Annotated[int, "of nested objects and arrays; 120 at most"] = 64

    def __post_init__(self) -> None:
        if self.max_depth > 120:  # orjson writes 254, and there may be JSON in JSON
            raise ValueError(f"MAX_DEPTH must be 120 at most, not {self.max_depth}")


def merge(default: Any, override: Any) -> Any:
    """Merge `override` onto `default`: objects key by key, deeply; anything else replaces.

    Neither argument is modified. Keys that are not overridden keep the default's own values (the
    same objects), and where nothing is overridden the default itself is returned.
    """
    if not (isinstance(default, dict) and isinstance(override, dict)):
        return override
    merged = default | override
    for key in override:  # `type` says no in half the time that isinstance takes
        if type(value := override[key]) is dict and key in default:
            merged[key] = merge(default[key], value)
    return merged if override else default


@dataclass
class Messages:
    """The agent configs or the job messages of a run: a default, overridden message by message.

    Iterating makes them in the order of their index, each a dict of its own whose untouched
    values are the default's. With `only`, these indexes alone are made, and counted.
    """

    default: Json
    target: str  #: the key that carries a message's own index
    count: int  #: of the full run
    only: list[int] | None = None  #: sorted and distinct
    rows: list[bytes | None] = field(default_factory=list)  #: by index: what overrides it, as JSON

    encode = staticmethod(orjson.dumps)  #: a message as JSON

    def __len__(self) -> int:
        return len(self.only or range(self.count))

    def __iter__(self) -> Iterator[Json]:
        for index in self.only or range(self.count):
            override = orjson.loads(self.rows[index] or b"{}")
            override[self.target] = index
            yield merge(self.default, override)


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was found valid."""

    run_id: str
    image_name: str
    image_version: str
    agent_cpu: str  #: a Kubernetes quantity, as `agent_memory` is
    agent_memory: str
    requirements: str  #: pip requirements, "" where none were given
    job_time_limit: float | None  #: seconds that one job may take
    configs: Messages
    jobs: Messages
    warnings: list[str]

    @property
    def k8s_job(self) -> str:
        """The name of its Kubernetes Job."""
        return f"{self.image_name}-{self.run_id}"


def config_key(run_id: str, index: int) -> str:
    """The Redis key of an agent's config; existing agents read exactly this."""
    return f"{run_id}{index}"


def parse_run(
    parts: Mapping[str, bytes],
    new_run_id: str,
    limits: Limits,
    ending: Callable[[str], str],
    examine: Callable[[list[str]], list[Json]],
) -> Run:
    """Check everything that was posted and make it a `Run`. Raises `Invalid` with every problem.

    `new_run_id` is used where the template names none; `ending` gives, for a run id, the text
    appended to every script that agents get; `examine` says of all scripts at once, each given
    once, what `agent.examine` says of one.
    """
    form = _Part(limits, "form")
    if unknown := [name for name in parts if name not in PARTS]:
        form.slip(f"the parts {', '.join(map(repr, unknown))} are not known, and ignored")
    template, *sheets, python_code, requirements_txt, configtune = (
        replace(form, name=name, data=parts.get(name, b"").removeprefix(b"\xef\xbb\xbf"))
        for name in PARTS
    )
    for part in (template, *sheets):
        if part.name not in parts:
            part.bad(f"the part {part.name} is missing")
        elif part is template and not part.data:
            part.bad("the file is empty; it must be a JSON object", status=400)
    run, own, job = template.sections(configtune.json() or {})
    settings, agents, jobs, only = template.run_message(run, new_run_id)
    ids, end = {"run_id": settings["run_id"]}, ending(settings["run_id"])
    script, config = python_code.text(), dict(own or {})
    if script and not script.isspace():
        config["code"] = python_code.script(script, end)
    elif config.get("code") is not None:
        config["code"] = template.script(config["code"], end, field="default_agent_message.code")
    elif script is not None and own is not None:
        python_code.bad("no script: send this part, or put one into default_agent_message.code")
    made = (
        Messages({**(job or {}), **ids}, "targetted_job", jobs, only),
        Messages({**config, **ids}, "targetted_agent", agents),
    )
    for messages, sheet in zip(made, sheets, strict=True):
        name = sheet.name.replace("data", "default") + "_message"
        size = len(orjson.dumps({**messages.default, messages.target: messages.count}))
        if not template.fits(_MERGED, size, limits.max_message_bytes, field=name):
            messages.default = {}  # its rows are judged all the same
        messages.rows = sheet.rows(messages, limits.max_message_bytes - size, end)
    settings["requirements"] = requirements_txt.requirements()
    form.judge(examine(list(form.scripts)))
    if form.problems:
        raise Invalid(form.problems)
    return Run(**settings, jobs=made[0], configs=made[1], warnings=form.warnings())


@dataclass
class _Part:
    """One part of a form, and what has been found in all of them."""

    limits: Limits
    name: str = ""
    data: bytes = b""
    long: bool = False  #: whether a CSV has numbers that orjson would round
    problems: list[Problem] = field(default_factory=list)
    #: what is allowed but mostly a slip, by part and text: its first line, and how often it is
    slips: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    scripts: dict[str, list[tuple["_Part", Json]]] = field(default_factory=dict)  #: and where

    def bad(self, message: str, line: int | None = None, field: str = "", **more: Any) -> None:
        """Note a problem, cut short where it quotes much. Raises `Invalid` at one too many."""
        if len(self.problems) == MAX_PROBLEMS:
            left = f"there are more problems than the {MAX_PROBLEMS} listed"
            raise Invalid([*self.problems, Problem(self.name, left)])
        field = field[:400].encode(errors="backslashreplace").decode()
        self.problems.append(Problem(self.name, message[:400], line, field=field or None, **more))

    def slip(self, text: str, line: int | None = None) -> None:
        """Note what will be a warning: once, however often it is."""
        self.slips.setdefault((self.name, text[:2000]), [line or 0, 0])[1] += 1

    def warnings(self) -> list[str]:
        """What was noted to be a warning."""
        return [
            str(Problem(part, text, line)) + f" ({times} in all)" * (times > 1)
            for (part, text), (line, times) in self.slips.items()
        ]

    def must(self, key: str, must: str, values: Json, **where: Any) -> None:
        """Note that a field is not what it must be."""
        got = f"not {json.dumps(values[key])[:80]}" if key in values else "but is missing"
        self.bad(f"{key} must be {must}, {got}", **where)

    def fits(self, what: str, size: int, limit: int, **where: Any) -> bool:
        """Whether something of `size` bytes is within its limit; that it is not is noted."""
        if size > limit:
            self.bad(f"{what} has {size} bytes; at most {limit} are allowed", status=413, **where)
        return size <= limit

    def script(self, code: Any, ending: str, **where: Any) -> str:
        """A script as agents get it. It will be examined."""
        most = self.limits.max_script_bytes
        if not isinstance(code, str):
            self.must("code", "a string", {"code": code}, **where)
        elif self.fits("the script (MAX_SCRIPT_BYTES)", len(code.encode()), most, **where):
            self.scripts.setdefault(code, []).append((self, where))
        return f"{code}{ending}"

    def judge(self, verdicts: list[Json]) -> None:
        """Note the scripts that do not compile, and those that know no jobs."""
        for places, found in zip(self.scripts.values(), verdicts, strict=True):
            for part, where in places:
                if error := found.get("error"):
                    where = where or {key: found.get(key) for key in ("line", "column")}
                    part.bad(f"the script does not compile: {error}", **where)
                elif not found.get("task"):
                    slip = f"the script registers no task {TASK}; will agents know the jobs?"
                    part.slip(slip, where.get("line"))

    def text(self) -> str | None:
        """The part as text; None with a problem where it is not."""
        limit = 2 * self.limits.max_message_bytes + 2**20  # two messages, and white space
        table = self.name.startswith("data")
        for line, data in enumerate(io.BytesIO(self.data), 1) if table else [(None, self.data)]:
            if len(data) > limit:
                self.fits("the line" if table else "the file", len(data), limit, line=line)
                return None
        if table and self.data.isascii() and b"\0" not in self.data and b"\r" not in self.data:
            return ""  # what `table` reads line by line
        text = self.data.decode(errors="surrogateescape")
        if fault := (_NO_LINE if table else _NO_TEXT).search(text):
            at, status = fault.start(), 400 if self.name.startswith("config") else 422
            row, column = 1 + text.count("\n", 0, at), at - text.rfind("\n", 0, at)
            wrong = f"byte 0x{ord(fault[0]) & 255:02x} is not UTF-8 text with LF or CRLF"
            self.bad(f"{wrong}; save the file so", row, column=column, status=status)
            return None
        if "\ufffd" in text and self.name in PARTS[:3]:
            row = 1 + text.count("\n", 0, text.index("\ufffd"))
            self.slip("a character is lost (U+FFFD): a browser or an editor has damaged it", row)
        return text

    def json(self, change: Callable[..., Any] | None = None) -> Json | None:
        """The part as a JSON object, changed; None where it was not posted, or with a problem."""

        def pairs(items: list[tuple[str, Any]]) -> Json:
            for name, times in Counter(name for name, _ in items).items():
                if times > 1:
                    self.bad(f"the key {name!r} stands {times} times", field=name)
            return dict(items)

        if not (text := self.text()):
            return None
        try:
            value = json.loads(text, object_pairs_hook=pairs, **_STRICT)
            known = len(self.problems)
            if not isinstance(value, dict):
                self.bad(f"must be a JSON object, not {json.dumps(value)}")
            value = self.walk(value, change, None, "", 0)
            return value if len(self.problems) == known else None
        except RecursionError:
            self.bad(f"nested deeper than {self.limits.max_depth} levels")
        except ValueError as error:
            if not isinstance(error, json.JSONDecodeError):  # a constant, refused without a place
                found = next(match for match in _CONSTANT.finditer(text) if match[1])
                said = f"{found[1]} is not JSON; use null or a number"
                error = json.JSONDecodeError(said, text, found.start())
            message = f"not JSON: {error}; a comma too many, or a quote that is not double?"
            self.bad(message, error.lineno, column=error.colno, status=400)
        return None

    def walk(self, value: Any, change: Any, line: int | None, path: str, level: int) -> Any:
        """A parsed value, its strings changed; what cannot be sent as JSON is noted, not kept."""
        depth, walked = self.limits.max_depth, {}
        if isinstance(value, dict | list) and level < depth:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                where = f"{path}.{key}"[:300] if path else str(key)[:300]
                name = self.walk(key, None, line, where, 0)
                walked[name] = self.walk(item, change, line, where, level + 1)
            return walked if isinstance(value, dict) else list(walked.values())
        if isinstance(value, dict | list):
            self.bad(f"nested deeper than {depth} levels", line, field=path)
        elif isinstance(value, str) and _SURROGATE.search(value):
            self.bad("a lone surrogate is not text", line, field=path)
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            self.bad("a number too large for 64 bits; write it as a string", line, field=path)
        else:
            changed = change and isinstance(value, str)
            return change(value, line, path, level) if changed else value
        return ""

    def sections(self, tune: Json) -> Iterator[Any]:
        """The template's three objects, every `$env_NAME` in them replaced by `tune["NAME"]`."""
        tuned = {f"$env_{name}": value for name, value in tune.items()}
        left: dict[str, None] = {}

        def change(text: str, *_: Any) -> Any:
            if text.startswith("$env_") and text not in tuned:
                left[text] = None
            return tuned.get(text, text)

        template = self.json(change)
        if left:
            self.slip(f"configtune has no value for {', '.join(map(repr, left))}")
        for name in ("run_message", "default_agent_message", "default_job_message"):
            value = (template or {}).get(name)
            if template is not None and not isinstance(value, dict):
                self.must(name, "an object", template, field=name)
            yield value if isinstance(value, dict) else None

    def run_message(self, values: Json | None, new_run_id: str) -> tuple[Json, int, int, Any]:
        """What run_message sets, with something usable in place of what is wrong."""
        limits, given = self.limits, _OPTIONAL | (values or {})
        if generated := given.get("run_id") is None:
            given["run_id"] = new_run_id
        found: Json = {"number_of_agents": 1, "number_of_jobs": limits.max_jobs}
        wrong: dict[str, str] = {}
        for key, (pattern, must) in _FIELDS.items():
            if re.fullmatch(pattern, json.dumps(given.get(key))):
                found[key] = given.get(key)
            else:
                wrong[key], found[key] = must, found.get(key, "")
        agents, jobs, only = map(found.pop, ("number_of_agents", "number_of_jobs", "only_jobs"))
        run_id, image, only = found["run_id"], found["image_name"], sorted(only or ())
        host = f"{image}-{run_id}-{agents - 1}"
        if run_id in RESERVED:
            wrong["run_id"] = f"none of {', '.join(RESERVED)}, names that Celery uses itself"
        if agents > limits.max_agents:
            raised = "have MAX_AGENTS or LOCAL_MAX_AGENTS raised"
            wrong["number_of_agents"] = f"at most {limits.max_agents} here (lower it, or {raised})"
        if jobs > limits.max_jobs:
            wrong["number_of_jobs"] = (
                f"at most {limits.max_jobs} here (lower it, or have MAX_JOBS raised)"
            )
        if len(set(only)) < len(only) or max(only, default=0) >= jobs:
            wrong["only_jobs"] = f"a list of distinct integers below number_of_jobs ({jobs})"
        if len(host) > 63:
            longer = "image_name" if generated or len(image) > len(run_id) else "run_id"
            wrong[longer] = f"shorter: Kubernetes allows 63 characters, and {host} has {len(host)}"
        for key, must in wrong.items() if values is not None else ():  # else that has been said
            self.must(key, must, given, field=f"run_message.{key}")
        if unknown := [key for key in values or () if key not in _FIELDS]:
            self.slip(f"run_message has no field {', '.join(map(repr, unknown))}: ignored")
        return found, min(agents, limits.max_agents), min(jobs, limits.max_jobs), only or None

    def requirements(self) -> str:
        """The pip requirements, each read as pip would; "" where there are none."""
        from packaging.requirements import InvalidRequirement, Requirement  # not at each start

        text = self.text() or ""
        for found in _PIP_LINE.finditer(text):  # one that ends with a backslash goes on in the next
            requirement = _PIP_ASIDE.sub("", _PIP_JOINED.sub("", found[0])).strip()
            try:
                if requirement and not _PIP_DIRECT.match(requirement):
                    Requirement(requirement)
            except (InvalidRequirement, RecursionError) as error:
                wrong = str(error).partition("\n")[0]
                line = text.count("\n", 0, found.start()) + 1
                self.bad(f"{requirement[:80]!r} is no requirement: {wrong}", line)
        return text if text.strip() else ""

    def rows(self, messages: Messages, room: int, ending: str) -> list[bytes | None]:
        """What a CSV overrides each message with, by its index, as JSON."""
        default, target, count = messages.default, messages.target, messages.count
        # One place more than there are messages: a file may count from 1.
        rows: list[bytes | None] = [None] * (count + 1)
        beyond, last = False, 0
        nested = {column for column, value in default.items() if isinstance(value, dict | list)}
        outside = f"a row that targets no index below {count} is ignored"
        for line, index, row in self.targets(target):
            if not 0 <= index <= count:
                self.slip(outside, line)
                beyond |= index > count
                continue
            if rows[index] is not None:
                self.bad(f"a second row for {target} {index}", line, field=target)
            for column, text in row.items():
                if text[0] in "{[":
                    row[column] = self.cell(text, line, column)
                if column not in default:
                    slip = f"the column {column!r} is no key of the default message, and rows are"
                    self.slip(f"{slip} selected by {target!r}", line)
                elif column in nested and row[column] is text:
                    self.slip(f"a cell of {column!r} is no JSON, but its default is", line)
            if "code" in row and target == "targetted_agent":
                row["code"] = self.script(row["code"], ending, line=line, field="code")
            # A copy: what orjson returns keeps a kilobyte.
            data = rows[index] = orjson.dumps(row) + b" "
            if len(data) > room:  # else no message can be too large
                size = len(orjson.dumps(merge(default, row)))
                self.fits(_MERGED, size, self.limits.max_message_bytes, line=line)
            if index == count:
                last = line
        if not beyond and rows[0] is None and rows[count] is not None:
            self.slip(f"{target} is counted from 1 in this file, taken so")
            return rows[1:]
        if rows[0] is None and rows[1] is not None:
            self.slip(f"no row has the {target} 0; 1 is the second message, as the first is 0")
        if rows.pop() is not None:
            self.slip(outside, last)
        return rows

    def targets(self, target: str) -> Iterator[tuple[int, int, Json]]:
        """The rows of a CSV: line, index of the message that it overrides, cells not blank."""
        table = self.table() if not self.data.isspace() else iter(())
        columns = self.columns(*next(table, (1, [])), target)
        selected = target in columns
        for position, (line, cells) in enumerate(table if columns else ()):
            if len(cells) > len(columns):
                self.bad(f"{len(cells)} cells in {len(columns)} columns; quote commas", line)
                continue
            pairs = zip(columns, cells, strict=False)  # a row may be short
            row = {column: text for column, cell in pairs if (text := cell.strip())}
            index = row.pop(target, "") if selected else str(position)
            if _INDEX.fullmatch(index):
                yield line, int(index), row
            elif index or row:
                self.bad(f"{index[:80]!r} is not a whole number", line, field=target)

    def cell(self, text: str, line: Any, path: str, level: int = 1, odd: Any = False) -> Any:
        """The JSON object or array that a text is, and texts in it are; or else the text itself."""
        bare, depth = text.strip(" \t\r\n"), self.limits.max_depth
        if bare[:1] not in ("{", "["):
            return text
        # What orjson may read otherwise: a large integer, an escape, a string that may be JSON too.
        odd = odd or self.long or "\\" in bare or '"{' in bare or '"[' in bare or '" ' in bare
        if len(bare) + level > depth:  # else it cannot be nested deeper
            odd = odd or bare.count("{") + bare.count("[") + level > depth
        try:
            if not odd:
                return orjson.loads(bare)
            return self.walk(_DECODER.decode(bare), self.cell, line, path, level)
        except RecursionError:
            self.bad(f"nested deeper than {depth} levels", line, field=path)
            return ""
        except ValueError:  # and orjson refuses some that `walk` names
            return text if odd else self.cell(text, line, path, level, True)

    def columns(self, line: int, header: list[str], target: str) -> list[str]:
        """The columns of a CSV; none where one of them is wrong."""
        known, columns = len(self.problems), [name.strip() for name in header]
        if len(columns) > (limit := self.limits.max_columns):
            self.bad(f"{len(columns)} columns; at most {limit} are allowed (MAX_COLUMNS)", line)
        for number, name in enumerate(columns[:limit], 1):
            letters = re.sub(r"\W", "", name.casefold())[:30]
            near = name != target and get_close_matches(letters, _TARGETS, 1, 0.87)
            wrong = {
                f"column {number} has no name; name it or delete it": not name,
                "run_id cannot be overridden; remove it": name == "run_id",
                f"the column {name!r} stands twice": bool(name) and name in columns[: number - 1],
                "separate the columns by commas": not columns[1:] and re.search("[;\t]", name),
                f"the column {name!r} selects no row; the name must be {target!r} here": near,
            }
            for text in filter(wrong.get, wrong):
                self.bad(text, line, field=name)
            if _INDEX.fullmatch(name.replace(".", "", 1)) or name.startswith(("{", "[")):
                self.slip(f"the first row names the columns, and {name!r} looks like data", line)
        return columns if len(self.problems) == known else []

    def table(self) -> Iterator[tuple[int, list[str]]]:
        """The rows of a CSV that are not blank, each with the number of its first line."""
        line = 1  # that the row begins in

        def quoted() -> Iterator[str]:
            for number, data in enumerate(io.BytesIO(self.data), 1):
                start = "," if number == line else ',"'  # the line goes on within quotes
                yield _cell().sub(_bare, start + data.decode())[len(start) :]

        if self.text() is None:
            return
        fields = b"," + self.data.translate(_FIELD_STARTS, b" \t")
        bare, self.long = b",{" in fields, b"0" * 19 in fields
        del fields  # which is as large as the file
        # Of the process: always the same.
        csv.field_size_limit(2 * self.limits.max_message_bytes + 2**20)
        source = quoted() if bare else map(bytes.decode, io.BytesIO(self.data))
        reader = csv.reader(source, strict=True, skipinitialspace=True)
        while True:
            try:
                for cells in reader:
                    if cells:
                        yield line, cells
                    line = reader.line_num + 1
                return
            except csv.Error as error:
                never = "a quote opens in this row and never closes"
                self.bad(_CLOSED if "expected after" in str(error) else never, line)
                line = reader.line_num + 1


@cache
def _cell() -> re.Pattern[str]:
    """A cell in quotes; or in brackets, and what follows; or with a bracket that never closes."""
    brackets, string = "(?!)", r'"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*+'
    for _ in range(64):  # levels; in each a text is read once, without going back
        item = rf"(?:{string}:\s*+)?+(?:{string}|[\w.+-]++\s*+|{brackets}\s*+)"
        brackets = rf"[\[{{]\s*+(?:{item}(?:,\s*+|(?=[\]}}])))*+[\]}}]"
    quoted = r'"[^"]*+(?:""[^"]*+)*+(?:"|$)'
    return re.compile(rf",[ \t]*+(?:{quoted}|({brackets})[ \t]*+([^,\r\n]*+)|[\[{{].*)")


def _bare(cell: re.Match[str]) -> str:
    """A cell of a CSV; if it is bare JSON (`{"a": 1, "b": 2}`), quoted as CSV wants it."""
    bare = cell[1] and not cell[2].strip()
    return f',"{cell[1].replace('"', '""')}"' if bare else cell[0]
