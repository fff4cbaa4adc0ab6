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
from difflib import SequenceMatcher
from typing import Any

import orjson
from packaging.requirements import InvalidRequirement, Requirement

type Json = dict[str, Any]

PARTS = "configtemplate", "data_job", "data_agent", "python_code", "requirements_txt", "configtune"
TASK = "tasks.consume_message"  # that agents' scripts register, and that jobs are sent to
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
    "only_jobs": (r"null|\[[0-9]+(?:, [0-9]+)*+\]", "a list of integers from 0"),
}
_OPTIONAL: Json = {"image_version": "latest", "agent_cpu": "500m", "agent_memory": "512Mi"}

# What is no text, and what no line of a CSV; a byte that is not UTF-8 has become a surrogate.
_NO_TEXT, _NO_LINE = re.compile("[\0\udc80-\udcff]"), re.compile("[\0\udc80-\udcff]|\r(?!\n)")
_FAULTS = {
    "\0": "a NUL byte; save the file as plain text in UTF-8",
    "\r": "a carriage return without line feed; end lines with LF or CRLF",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
#: JSON read strictly; a number that is too large becomes an integer that is, for `check`
_STRICT: Json = {
    "parse_constant": int,  # which knows none of them
    "parse_int": lambda digits: int(digits[:30]),
    "parse_float": lambda digits: value if math.isfinite(value := float(digits)) else 2**64,
}
_DECODER = json.JSONDecoder(**_STRICT)
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*+"|(NaN|-?Infinity)')
_JSON_TYPES = {str: "a string", dict: "an object", list: "an array", int: "a number"}
_JSON_IN_JSON = re.compile(r'"\s*[\[{]')
_INDEX = re.compile(r"[+-]?[0-9]{1,1000}")
_BRACKETS, _STRING = "(?!)", r'"(?:[^"\\]|\\.)*+"\s*+'
for _ in range(64):  # levels; in each a text is read once, without going back
    _ITEM = rf"(?:{_STRING}:\s*+)?+(?:{_STRING}|[\w.+-]++\s*+|{_BRACKETS}\s*+)"
    _BRACKETS = rf"[\[{{]\s*+(?:{_ITEM}(?:,\s*+|(?=[\]}}])))*+[\]}}]"
# A cell in quotes; or in brackets, and what follows; or with one that never closes; or any other.
_QUOTED, _OTHER = r'"(?:[^"]|"")*+(?:"[^,]*+|$)', r"[\[{].*|[^,]*+"
_CELL = re.compile(rf"(?<![^,])[ \t]*+(?:{_QUOTED}|({_BRACKETS})[ \t]*+([^,\r\n]*+)|{_OTHER})")
_BARE = re.compile(r",[ \t]*+[\[{]")
_FILE = re.compile(r"\s*#\W*(?:file\W+)?([\w./-]+\.py)\W*")  # begins in a bundle: `# == x.py ==`
_PIP_ASIDE = re.compile(r"(^|\s)(#|--?[A-Za-z]).*")  # a comment, or options
_PIP_DIRECT = re.compile(r"[A-Za-z][\w+.-]*://|file:|~|[\w./-]+(/|\.whl|\.zip|\.tar\.|\.tgz)")


def examine(script: str) -> "Json":
    """Tell whether `script` compiles, and by its syntax tree registers the task of jobs.

    Returns `error` (None where it compiles) with its `line`, `column` (both from 1) and `text`
    where they are known, and `task`. Stands by itself, imports included: its source can be run in
    another process, for a compiler can be made to use all memory, or to crash.
    """
    import ast
    import warnings

    task = "tasks.consume_message"
    found: Json = {"error": None, "line": None, "column": None, "text": None, "task": False}
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(script, "script", "exec", dont_inherit=True)
            nodes = ast.walk(ast.parse(script if task in script else ""))
        # A name that is no constant may well be that of the task, as the script holds it.
        names = (n.value for n in nodes if isinstance(n, ast.keyword) and n.arg == "name")
        found["task"] = any(getattr(name, "value", task) == task for name in names)
    except SyntaxError as error:
        line = error.lineno or 0
        lines = script.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        found |= {"error": error.msg, "line": line or None, "column": error.offset}
        found["text"] = "".join(lines[line - 1 : line]).strip() or None
    except (RecursionError, MemoryError, ValueError, OverflowError) as error:
        found["error"] = str(error) or type(error).__name__
    return found


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
        super().__init__(str(min(problems, key=lambda problem: problem.status)))
        self.problems = problems
        #: 400 when a part does not parse, else 413 when one is too large, else 422
        self.status = min(problem.status for problem in problems)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may hold. Sizes in bytes of UTF-8."""

    agents: int = 10_000
    jobs: int = 1_000_000
    message: int = 8 * 2**20  #: one merged agent config or job message, as JSON
    columns: int = 1_000
    depth: int = 64  #: of nested objects and arrays; 120 at most, as orjson writes 254 levels
    agents_hint: str = "ask the operator to raise MAX_AGENTS"  #: what to do about too many agents
    script: int = 2**20  #: one script, without the ending that is appended to it
    k8s_names: bool = True  #: whether pods take their host names, of 63 characters, from the run


def merge(default: Any, override: Any) -> Any:
    """Merge `override` onto `default`: objects key by key, deeply; anything else replaces.

    Neither argument is modified. Keys that are not overridden keep the default's own values (the
    same objects), and where nothing is overridden the default itself is returned.
    """
    if not (isinstance(default, dict) and isinstance(override, dict)):
        return override
    merged = {**default, **override}
    for key, value in override.items():
        if type(value) is dict:  # says no in half the time that isinstance takes
            merged[key] = merge(default.get(key), value)
    return merged if override else default


@dataclass
class Messages:
    """The agent configs or the job messages of a run: a default, overridden message by message.

    Iterating makes the messages in the order of their index, each a dict of its own whose
    untouched values are the default's. With `only`, these indexes alone are made, and counted.
    """

    default: Json
    target: str  #: the key that carries a message's own index
    count: int  #: of the full run
    only: list[int] | None = None  #: sorted and distinct
    rows: list[bytes | None] = field(default_factory=list)  #: by index: what overrides it, as JSON

    def __len__(self) -> int:
        return len(self.only or range(self.count))

    def __iter__(self) -> Iterator[Json]:
        return map(self.make, self.only or range(self.count))

    def make(self, index: int) -> Json:
        """The message number `index`."""
        row = self.rows[index] if self.rows else None
        override = orjson.loads(row) if row else {}
        override[self.target] = index
        message: Json = merge(self.default, override)
        return message

    encode = staticmethod(orjson.dumps)  #: a message as JSON


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
    ending: Callable[[str], str] = lambda run_id: "",
    examine: Callable[[list[str]], list[Json]] = lambda scripts: list(map(examine, scripts)),
) -> Run:
    """Check everything that was posted and make it a `Run`.

    `parts` are the parts of the form by name; `new_run_id` is used where the template names none;
    `ending` gives, for a run id, the text appended to every script that agents get; `examine` does
    for all scripts at once, each given once, what the function of that name does for one.
    Raises `Invalid` with every problem found.
    """
    form = _Part(limits)
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
    script = python_code.text(python_code.data)
    config = dict(own or {})
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
        if not template.fits("merged message", orjson.dumps(messages.make(0)), field=name):
            messages.default = {}  # its rows are judged all the same
        messages.rows = sheet.rows(messages, end)
    settings["requirements"] = requirements_txt.requirements()
    form.judge(examine)
    if form.problems:
        raise Invalid(form.problems)
    return Run(**settings, jobs=made[0], configs=made[1], warnings=form.warnings())


@dataclass
class _Part:
    """One part of a form, and what has been found in all of them."""

    limits: Limits
    name: str = ""
    data: bytes = b""
    problems: list[Problem] = field(default_factory=list)
    #: what is allowed but mostly a slip, by part and text: its first line, and how often it is
    slips: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    scripts: dict[str, list[tuple["_Part", Json]]] = field(default_factory=dict)  #: and where

    def bad(self, message: str, line: int | None = None, **more: Any) -> None:
        """Note a problem, cut short where it quotes much. Raises `Invalid` at one too many."""
        if len(self.problems) == MAX_PROBLEMS:
            left = f"there are more problems than the {MAX_PROBLEMS} listed"
            raise Invalid([*self.problems, Problem(self.name, left)])
        field = (more.pop("field", None) or "")[:400].encode(errors="backslashreplace").decode()
        self.problems.append(Problem(self.name, message[:400], line, field=field or None, **more))

    def slip(self, text: str, line: int | None = None) -> None:
        """Note what will be a warning: once, however often it is."""
        self.slips.setdefault((self.name, text[:2000]), [line or 0, 0])[1] += 1

    def warnings(self) -> list[str]:
        """What is allowed, but mostly a slip."""
        return [
            str(Problem(part, text, line)) + f" ({times} in all)" * (times > 1)
            for (part, text), (line, times) in self.slips.items()
        ]

    def fits(self, what: str, data: bytes, **where: Any) -> bool:
        """Whether something is within its limit; that it is not is noted."""
        setting = "MAX_SCRIPT_BYTES" if what == "script" else "MAX_MESSAGE_BYTES"
        limits = {"script": self.limits.script, "merged message": self.limits.message}
        limit = limits.get(what, 2 * self.limits.message + 2**20)  # two messages, and white space
        if len(data) > limit:
            message = f"the {what} has {len(data)} bytes; at most {limit} are allowed ({setting})"
            self.bad(message, status=413, **where)
        return len(data) <= limit

    def script(self, code: Any, ending: str, **where: Any) -> str:
        """A script as agents get it. It will be examined."""
        if not isinstance(code, str):
            self.bad(f"code must be a string, not {_json_type(code)}", **where)
        elif self.fits("script", code.encode(), **where):
            self.scripts.setdefault(code, []).append((self, where))
        return f"{code}{ending}"

    def judge(self, examine: Callable[[list[str]], list[Json]]) -> None:
        """Note the scripts that do not compile, and those that know no jobs."""
        results = examine(list(self.scripts)) if self.scripts else []
        for (script, places), found in zip(self.scripts.items(), results, strict=True):
            wrong, line = f"the script does not compile: {found.get('error')}", found.get("line")
            if line:
                before = enumerate(reversed(script.split("\n")[: line - 1]), 1)
                files = ((own, _FILE.fullmatch(text[:120])) for own, text in before)
                file = next((f", line {own} of {file[1]}" for own, file in files if file), "")
                wrong += f" (line {line}{file})"
            if found.get("text"):
                wrong += f": {found['text']}"
            for part, where in places:
                if found.get("error"):
                    part.bad(wrong, **where or {"line": line, "column": found.get("column")})
                elif not found.get("task"):
                    slip = f"the script registers no task {TASK}; will agents know the jobs?"
                    part.slip(slip, where.get("line"))

    def text(self, data: bytes, line: int | None = None) -> str | None:
        """The part's data as text, or a line of it; None with a problem where it is not."""
        large = len(data) > self.limits.message  # which is still less than is allowed
        if large and not self.fits("line" if line else "file", data, line=line):
            return None
        text = data.decode(errors="surrogateescape")
        if text.isascii() and "\0" not in text and "\r" not in text:  # mostly
            return text
        if fault := (_NO_LINE if line else _NO_TEXT).search(text):
            at, status = fault.start(), 400 if self.name.startswith("config") else 422
            row, column = (line or 1) + text.count("\n", 0, at), at - text.rfind("\n", 0, at)
            wrong = f"byte 0x{ord(fault[0]) & 255:02x} is not UTF-8; save the file as UTF-8"
            if data.startswith((b"\xff\xfe", b"\xfe\xff")):
                wrong = "the file is UTF-16; save it as UTF-8"
            self.bad(_FAULTS.get(fault[0], wrong), row, column=column, status=status)
            return None
        if "\ufffd" in text and self.name in PARTS[:3]:
            row = (line or 1) + text.count("\n", 0, text.index("\ufffd"))
            self.slip("a character is lost (U+FFFD): a browser or an editor has damaged it", row)
        return text

    def json(self) -> Json | None:
        """The part as a JSON object; None where it was not posted, or with a problem."""
        text = self.text(self.data)
        if not text:
            return None

        def pairs(items: list[tuple[str, Any]]) -> Json:
            for name, times in Counter(name for name, _ in items).items():
                if times > 1:
                    self.bad(f"the key {name!r} stands {times} times", field=name)
            return dict(items)

        try:
            value = json.loads(text, object_pairs_hook=pairs, **_STRICT)
        except RecursionError:
            self.bad(f"nested deeper than {self.limits.depth} levels")
        except ValueError as error:
            if not isinstance(error, json.JSONDecodeError):  # a constant, refused without a place
                constant = next(match for match in _CONSTANT.finditer(text) if match[1])
                said = f"{constant[1]} is not JSON; use null or a number"
                error = json.JSONDecodeError(said, text, constant.start())
            message = f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
            if error.msg.startswith(("Expecting property", "Expecting value", "Illegal")):
                message += "; is there a comma too many, or a quote that is not double?"
            self.bad(message, error.lineno, column=error.colno, status=400)
        else:
            if isinstance(value, dict) and self.check(value):
                return value
            if not isinstance(value, dict):
                self.bad(f"must be a JSON object, not {_json_type(value)}")
        return None

    def check(self, value: Any, line: int | None = None, path: str = "", level: int = 0) -> bool:
        """Whether a parsed value can be sent on as JSON; what in it cannot is noted."""
        known, depth, wrong = len(self.problems), min(self.limits.depth, 120), ""
        if isinstance(value, dict | list) and level >= depth:
            wrong = f"nested deeper than {depth} levels"
        elif isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                where = f"{path}.{key}"[:300] if path else str(key)[:300]
                self.check(key, line, where)
                self.check(item, line, where, level + 1)
        elif isinstance(value, str) and _SURROGATE.search(value):
            wrong = "a lone surrogate is not text"
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            wrong = "a number too large for 64 bits; write it as a string"
        if wrong:
            self.bad(wrong, line, field=path)
        return len(self.problems) == known

    def sections(self, tune: Json) -> Iterator[Any]:
        """The template's three objects, every `$env_NAME` in them replaced by `tune["NAME"]`."""
        left: dict[str, None] = {}

        def change(text: str) -> Any:
            name = text.removeprefix("$env_")
            if name != text and name not in tune:
                left[text] = None
            return text if name == text else tune.get(name, text)

        template = _mapped(self.json(), change)
        if left:
            self.slip(f"configtune has no value for {', '.join(map(repr, left))}")
        for name in ("run_message", "default_agent_message", "default_job_message"):
            value = (template or {}).get(name)
            if template is not None and not isinstance(value, dict):
                wrong = f"is {_json_type(value)}" if name in template else "is missing"
                self.bad(f"{name} {wrong}; it must be an object", field=name)
            yield value if isinstance(value, dict) else None

    def run_message(self, values: Json | None, new_run_id: str) -> tuple[Json, int, int, Any]:
        """What run_message sets, with something usable in place of what is wrong."""
        limits, given = self.limits, _OPTIONAL | (values or {})
        if generated := given.get("run_id") is None:
            given["run_id"] = new_run_id
        found: Json = dict.fromkeys(_FIELDS, "") | {"number_of_agents": 1, "only_jobs": None}
        found["number_of_jobs"] = limits.jobs

        def bad(key: str, must: str) -> None:
            got = f"not {json.dumps(given[key])[:80]}" if key in given else "but is missing"
            self.bad(f"{key} must be {must}, {got}", field=f"run_message.{key}")

        for key, (pattern, must) in _FIELDS.items():
            if re.fullmatch(pattern, json.dumps(given.get(key))):
                found[key] = given.get(key)
            elif values is not None:  # else that has been said
                bad(key, must)
        run_id, image, only = found["run_id"], found["image_name"], found["only_jobs"] or []
        agents, jobs = found["number_of_agents"], found["number_of_jobs"]
        host = f"{image}-{run_id}-{agents - 1}"
        if run_id in RESERVED:
            bad("run_id", f"none of {', '.join(RESERVED)}, names that Celery uses itself")
        if agents > limits.agents:
            bad("number_of_agents", f"at most {limits.agents} here ({limits.agents_hint})")
        if jobs > limits.jobs:
            hint = "ask the operator to raise MAX_JOBS"
            bad("number_of_jobs", f"at most {limits.jobs} here ({hint})")
        if len(set(only)) < len(only) or max(only, default=0) >= jobs:
            bad("only_jobs", f"a list of distinct integers below number_of_jobs ({jobs})")
        if limits.k8s_names and len(host) > 63:
            longer = "image_name" if generated or len(image) > len(run_id) else "run_id"
            bad(longer, f"shorter: Kubernetes allows 63 characters, and {host} has {len(host)}")
        if unknown := [key for key in values or () if key not in _FIELDS]:
            self.slip(f"run_message has no field {', '.join(map(repr, unknown))}: ignored")
        for key in ("number_of_agents", "number_of_jobs", "only_jobs"):
            del found[key]
        return found, min(agents, limits.agents), min(jobs, limits.jobs), sorted(only) or None

    def requirements(self) -> str:
        """The pip requirements, each read as pip would; "" where there are none."""
        text, line = self.text(self.data) or "", 1
        # A line that ends with a backslash goes on in the next.
        for joined in text.replace("\r\n", "\n").replace("\\\n", "\0").split("\n"):
            requirement = _PIP_ASIDE.sub("", joined.replace("\0", "")).strip()
            try:
                if requirement and not _PIP_DIRECT.match(requirement):
                    Requirement(requirement)
            except (InvalidRequirement, RecursionError) as error:
                wrong = str(error).partition("\n")[0]
                self.bad(f"{requirement[:80]!r} is no requirement: {wrong}", line)
            line += 1 + joined.count("\0")
        return text if text.strip() else ""

    def rows(self, messages: Messages, ending: str) -> list[bytes | None]:
        """What a CSV overrides each message with, by its index, as JSON."""
        target, count = messages.target, messages.count
        table = self.table() if not self.data.isspace() else iter(())
        columns = self.columns(*next(table, (1, [])), target)
        at = columns.index(target) if target in columns else None
        override = self.overrides(messages, columns, ending)
        # One place more than there are messages: a file may count from 1.
        rows: list[bytes | None] = [None] * (count + 1)
        index = highest = -1
        outside, last = f"a row that targets no index below {count} is ignored", 0
        for line, cells in table if columns else ():
            index, cell = index + 1, ""
            if at is not None and at < len(cells):
                cell, cells[at] = cells[at].strip(), ""
            if len(cells) > len(columns):
                self.bad(f"{len(cells)} cells in {len(columns)} columns; quote commas", line)
                continue
            if at is not None and not _INDEX.fullmatch(cell):
                if cell or any(map(str.strip, cells)):
                    self.bad(f"{cell[:80]!r} is not a whole number", line, field=target)
                continue
            index = int(cell or index)
            highest = max(highest, index)
            if not 0 <= index <= count:
                self.slip(outside, line)
                continue
            if rows[index] is not None:
                self.bad(f"a second row for {target} {index}", line, field=target)
            rows[index] = override(cells, line)
            last = line if index == count else last
        if rows[0] is None and highest == count:
            self.slip(f"{target} is counted from 1 in this file, taken so")
            return rows[1:]
        if rows[0] is None and rows[1] is not None:
            self.slip(f"no row has the {target} 0; 1 is the second message, as the first is 0")
        if rows.pop() is not None:
            self.slip(outside, last)
        return rows

    def overrides(
        self, messages: Messages, columns: list[str], ending: str
    ) -> Callable[[list[str], int], bytes]:
        """What makes a row JSON, and notes what is wrong with it, or the message that it makes."""
        default, depth, limit = messages.default, self.limits.depth, self.limits.message
        size = len(orjson.dumps(messages.make(messages.count)))
        digits = self.data.translate(bytes.maketrans(b"123456789", b"000000000"))
        hint = f"; rows are selected by {messages.target!r}, and here by their position"
        unknown = "" if messages.target in columns else hint
        exact = b"0" * 19 in digits  # orjson would round such a number

        def override(cells: list[str], line: int) -> bytes:
            row, data = {}, b""
            try:
                for column, cell in zip(columns, cells, strict=False):  # a row may be short
                    if not (text := cell.strip()):
                        continue
                    value = row[column] = _value(text, exact) if text[0] in "{[" else text
                    if column not in default:
                        text = f"the column {column!r} is no key of the default message{unknown}"
                        self.slip(text, line)
                    elif value is text and isinstance(default[column], (dict, list)):
                        self.slip(f"a cell of {column!r} is no JSON, but its default is", line)
                if self.name == "data_agent" and "code" in row:
                    row["code"] = self.script(row["code"], ending, line=line, field="code")
                # A copy: what orjson returns keeps a kilobyte, however short it is.
                data = orjson.dumps(row) + b" "
            except (TypeError, RecursionError):
                pass  # `check` says why
            deep = len(data) > 2 * depth and data.count(b"{") + data.count(b"[") > depth
            if (deep or not data) and self.check(row, line) and not data:
                self.bad(f"nested deeper than {depth} levels", line)
            if len(data) + size > limit:
                self.fits("merged message", orjson.dumps(merge(default, row)), line=line)
            return data

        return override

    def columns(self, line: int, header: list[str], target: str) -> list[str]:
        """The columns of a CSV; none where one of them is wrong."""
        known, columns = len(self.problems), [name.strip() for name in header]
        if len(columns) == 1 and (found := re.search("[;\t]", columns[0])):
            kind = "semicolons" if found[0] == ";" else "tabs"
            self.bad(f"the columns are separated by {kind}; save the file with commas", line)
        if len(columns) > (limit := self.limits.columns):
            self.bad(f"{len(columns)} columns; at most {limit} are allowed (MAX_COLUMNS)", line)
            return []
        for number, name in enumerate(columns, 1):
            letters, wrong = re.sub(r"[\W_]", "", name.casefold()), ""
            near = [t for t in ("targettedjob", "targettedagent") if abs(len(t) - len(letters)) < 3]
            likeness = max((SequenceMatcher(None, letters, t).ratio() for t in near), default=0)
            if not name:
                wrong = f"column {number} has no name; name it or delete it"
            elif name == "run_id":
                wrong = "run_id cannot be overridden; remove it"
            elif name in columns[: number - 1]:
                wrong = f"the column {name!r} stands twice"
            elif name != target and likeness > 0.83:  # but for two letters, or one more
                wrong = f"the column {name!r} selects no row; the name must be {target!r} here"
            elif _INDEX.fullmatch(name.replace(".", "", 1)) or name[0] in "{[":
                self.slip(f"the first row names the columns, and {name!r} looks like data", line)
            if wrong:
                self.bad(wrong, line, field=name)
        return columns if len(self.problems) == known else []

    def table(self) -> Iterator[tuple[int, list[str]]]:
        """The rows of a CSV that are not blank, each with the number of its first line."""
        fresh = True  # whether the next line begins a row, or goes on within quotes

        def lines() -> Iterator[str]:
            nonlocal fresh
            for number, data in enumerate(io.BytesIO(self.data), 1):
                if (text := self.text(data, number)) is None:
                    return
                if _BARE.search("," + text):
                    text = _CELL.sub(_bare, text) if fresh else _CELL.sub(_bare, '"' + text)[1:]
                fresh = False
                yield text

        plain = self.data.isascii() and b"\0" not in self.data and b"\r" not in self.data
        plain &= max(map(len, io.BytesIO(self.data)), default=0) <= self.limits.message
        plain &= b",{" not in self.data.translate(bytes.maketrans(b"[\n", b"{,"), b" \t")
        source = map(bytes.decode, io.BytesIO(self.data)) if plain else lines()  # a fast way first
        csv.field_size_limit(2 * self.limits.message + 2**20)  # of the process: always the same
        reader, line = csv.reader(source, strict=True, skipinitialspace=True), 1
        while True:
            try:
                for cells in reader:
                    if cells:
                        yield line, cells
                    line, fresh = reader.line_num + 1, True
                return
            except csv.Error as error:
                if "expected after" not in str(error):  # the end of the file
                    self.bad("a quote opens in this row and never closes", line)
                    return
                wrong = 'text between a closing quote and a comma; inside quotes, write " as ""'
                self.bad(wrong, line)
                line, fresh = reader.line_num + 1, True


def _json_type(value: Any) -> str:
    return _JSON_TYPES.get(type(value)) or json.dumps(value)


def _mapped(value: Any, change: Callable[[str], Any]) -> Any:
    """A parsed value with every string in it, but for keys, changed."""
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _value(text: str, exact: bool) -> Any:
    """The JSON object or array that a text is, or else the text."""
    if (stripped := text.strip())[:1] not in ("{", "["):
        return text
    try:
        value = _DECODER.decode(stripped) if exact else orjson.loads(stripped)
    except ValueError:
        return text if exact else _value(text, True)  # orjson refuses some that `check` names
    # Strings in it that look like JSON are parsed too; mostly there are none.
    inner = "\\" in text or _JSON_IN_JSON.search(text)
    return _mapped(value, lambda string: _value(string, exact)) if inner else value


def _bare(cell: re.Match[str]) -> str:
    """A cell of a CSV; if it is bare JSON (`{"a": 1, "b": 2}`), quoted as CSV wants it."""
    bare = cell[1] and not cell[2].strip()
    return f'"{cell[1].replace('"', '""')}"' if bare else cell[0]
