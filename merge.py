"""What a client posts goes in; a `Run`, or every problem found, comes out.

Nothing here touches anything but its arguments: no environment, no clock, no network, no file.
Same input, same output. Messages are made while they are read, one at a time, and share with the
default whatever they do not override.
"""

import csv
import io
import json
import re
import sys
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import orjson

type Json = dict[str, Any]

# The csv module's own limit of 128 KiB a cell would refuse scripts and large JSON cells; the size
# of a message is limited below. It is a setting of the process, so it is set once, here.
csv.field_size_limit(sys.maxsize)

PARTS = (
    "configtemplate",
    "data_job",
    "data_agent",
    "python_code",
    "requirements_txt",
    "configtune",
)
MAX_PROBLEMS = 1000  # an answer lists as many; a file with more has one cause, not a thousand

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
_QUANTITY = re.compile(
    r"\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?"
)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_BARE_JSON = re.compile(rb"(?:^|,)[ \t]*[\[{]", re.MULTILINE)
_CELL = re.compile(r'[ \t]*("(?:[^"]|"")*"[^,\r\n]*|[^,\r\n]*)')
_LONG_NUMBER = re.compile(r"[0-9]{17}")
_ENV = re.compile(r"\$env_(\w+)")
_JSON_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with what was posted, and where."""

    part: str
    message: str
    line: int | None = None  #: counted from 1, as an editor shows it
    column: int | None = None  #: counted from 1
    field: str | None = None
    status: int = 422  #: the HTTP status it calls for

    def as_json(self) -> Json:
        """The problem as the answer shows it, without what is not known."""
        shown = {
            "part": self.part,
            "line": self.line,
            "column": self.column,
            "field": self.field,
            "message": self.message,
        }
        return {key: value for key, value in shown.items() if value is not None}


class Invalid(Exception):
    """What was posted cannot be run. Carries every problem that was found."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems[0].message)
        self.problems = problems

    @property
    def status(self) -> int:
        """400 when a part does not parse, else 413 when one is too large, else 422."""
        statuses = {problem.status for problem in self.problems}
        return next(status for status in (400, 413, 422) if status in statuses)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may hold. Sizes in bytes of UTF-8."""

    agents: int = 10_000
    jobs: int = 1_000_000
    message: int = 8 * 2**20  #: one merged agent config or job message, as JSON
    columns: int = 1_000
    depth: int = 64  #: of nested objects and arrays
    agents_hint: str = "ask the operator to raise MAX_AGENTS"  #: what to do about too many agents


def merge(default: Any, override: Any) -> Any:
    """Merge `override` onto `default`: objects key by key, deeply; anything else replaces.

    Neither argument is modified. Keys that are not overridden keep the default's own values (the
    same objects), and where nothing is overridden the default itself is returned.
    """
    if not (isinstance(default, dict) and isinstance(override, dict)):
        return override
    if not override:
        return default
    merged = dict(default)
    for key, value in override.items():
        merged[key] = merge(default[key], value) if key in default else value
    return merged


@dataclass(slots=True)
class Messages:
    """The agent configs or the job messages of a run: a default, overridden message by message.

    Iterating makes the messages in the order of their index, each a dict of its own whose
    untouched values are the default's.
    """

    default: Json
    target: str  #: the key that carries a message's own index
    count: int
    part: str
    data: bytes = b""  #: the CSV
    columns: list[str] = field(default_factory=list)
    rows: array[int] = field(default_factory=lambda: array("q"))  #: by index: offset in `data`, -1
    appended: str = ""  #: what every `code` ends with (see `isolation`)
    _shared: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Json]:
        if not self.rows:
            for index in range(self.count):
                yield self.make(index, {})
            return
        end = -1
        rows: Iterator[tuple[int, int, int, list[str]]] = iter(())
        for index, offset in enumerate(self.rows):
            if offset < 0:
                yield self.make(index, {})
                continue
            if offset != end:  # rows mostly come in the order of their index; else, go there
                rows = _read_rows(self.data, offset)
            _, _, end, cells = next(rows)
            yield self.make(index, self.override(cells))

    def make(self, index: int, override: Json) -> Json:
        """The message number `index` with `override` merged in."""
        message = {**merge(self.default, override), self.target: index}
        if self.appended and message["code"] is not self.default.get("code"):
            message["code"] += self.appended
        return message

    def override(self, cells: list[str]) -> Json:
        """What a row overrides: its cells that are not blank, by column, JSON cells parsed."""
        return {
            column: _cell_value(cell)
            for column, cell in zip(self.columns, map(str.strip, cells), strict=False)
            if cell and column != self.target
        }

    def encode(self, message: Json) -> bytes:
        """`message` as JSON. What it shares with the default is serialised only once."""
        if not self._shared:
            self._shared = {
                key: orjson.Fragment(orjson.dumps(value))
                for key, value in self.default.items()
                if isinstance(value, dict | list | str)
            }
        default, shared = self.default, self._shared
        return orjson.dumps(
            {
                key: shared[key] if key in shared and value is default[key] else value
                for key, value in message.items()
            }
        )


@dataclass(frozen=True, slots=True)
class Run:
    """A run that was found valid."""

    run_id: str
    image_name: str
    image_version: str
    agent_cpu: str  #: a Kubernetes quantity, as `agent_memory` is
    agent_memory: str
    requirements: str  #: pip requirements, "" where none were given
    configs: Messages
    jobs: Messages
    warnings: list[str]


def isolation(run_id: str) -> str:
    """The line that ends every script: control messages of this run reach its workers only.

    It is appended, so that line numbers and `from __future__` stay right.
    """
    return (
        "\napp.conf.control_exchange = "
        f"{control_exchange(run_id)!r}; app.conf.event_exchange = {event_exchange(run_id)!r}\n"
    )


def control_exchange(run_id: str) -> str:
    """The run's own value for Celery's setting `control_exchange`."""
    return f"armada.{run_id}"


def event_exchange(run_id: str) -> str:
    """The run's own value for Celery's setting `event_exchange`."""
    return f"armada.{run_id}.events"


def config_key(run_id: str, index: int) -> str:
    """The Redis key of an agent's config; existing agents read exactly this."""
    return f"{run_id}{index}"


def collide(one: str, agents_of_one: int, other: str, agents_of_other: int) -> bool:
    """Whether two runs are the same, or would write one and the same `config_key`.

    Run `a` with eleven agents and run `a1` both have an `a10`.
    """
    if len(one) > len(other):
        one, agents_of_one, other = other, agents_of_other, one
    if one == other:
        return True
    rest = other.removeprefix(one)
    if rest == other or not re.fullmatch("[1-9][0-9]*", rest):
        return False
    return int(rest + "0") < agents_of_one  # the first of the longer one's keys


def parse_run(parts: Mapping[str, bytes], new_run_id: str, limits: Limits) -> Run:
    """Check everything that was posted and make it a `Run`.

    `parts` are the parts of the form by name; `new_run_id` is used where the template names none.
    Raises `Invalid` with every problem found.
    """
    problems: list[Problem] = []
    for name in ("configtemplate", "data_job", "data_agent"):
        if name not in parts:
            problems.append(Problem(name, f"the part {name} is missing"))
    template = _parse_json("configtemplate", parts.get("configtemplate"), limits, problems)
    tune = _parse_json("configtune", parts.get("configtune") or None, limits, problems)
    if template is not None and tune is not None:
        template = _tuned(template, tune)
    sections = {
        name: _section(template, name, problems)
        for name in ("run_message", "default_agent_message", "default_job_message")
    }
    settings = _run_message(sections["run_message"], new_run_id, limits, problems)
    run_id, agents, jobs = settings["run_id"], settings["agents"], settings["jobs"]
    warned: list[str] = []

    agent_default = {**sections["default_agent_message"], "run_id": run_id}
    script = _parse_text("python_code", parts.get("python_code", b""), problems)
    if script.strip():
        agent_default["code"] = script
    if template is not None and not problems:
        _check_code(agent_default.get("code"), bool(script.strip()), problems)
    appended = ""
    if isinstance(agent_default.get("code"), str):
        appended = isolation(run_id)
        agent_default["code"] += appended
    configs = Messages(agent_default, "targetted_agent", agents, "data_agent", appended=appended)
    job_default = {**sections["default_job_message"], "run_id": run_id}
    job_messages = Messages(job_default, "targetted_job", jobs, "data_job")
    for messages in (configs, job_messages):
        if problem := _message_problem(messages, messages.make(0, {}), limits, "configtemplate"):
            problems.append(problem)
        data = parts.get(messages.part, b"")
        _read_overrides(messages, data, limits, problems, warned)

    requirements = _parse_text("requirements_txt", parts.get("requirements_txt", b""), problems)
    if problems:
        left_out = len(problems) - MAX_PROBLEMS
        if left_out > 0:
            more = Problem(problems[0].part, f"and {left_out} more problems that are not listed")
            problems = [*problems[:MAX_PROBLEMS], more]
        raise Invalid(problems)
    return Run(
        run_id=run_id,
        image_name=settings["image_name"],
        image_version=settings["image_version"],
        agent_cpu=settings["agent_cpu"],
        agent_memory=settings["agent_memory"],
        requirements=requirements if requirements.strip() else "",
        configs=configs,
        jobs=job_messages,
        warnings=warned,
    )


# The template


def _parse_text(part: str, data: bytes, problems: list[Problem]) -> str:
    """The part as text; what is not UTF-8 or holds a NUL byte is a problem."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        problems.append(_utf16(part, data) or _not_utf8(part, error, line))
        return ""
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        problems.append(Problem(part, "a NUL byte; save the file as plain text", line))
        return ""
    return text


def _not_utf8(part: str, error: UnicodeDecodeError, line: int) -> Problem:
    byte = error.object[error.start]
    return Problem(part, f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8", line)


def _utf16(part: str, data: bytes) -> Problem | None:
    """The problem of a file that a spreadsheet or an editor saved as UTF-16."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return Problem(part, "the file is UTF-16; save it as UTF-8", 1)
    return None


def _parse_json(
    part: str, data: bytes | None, limits: Limits, problems: list[Problem]
) -> Json | None:
    """The part as a JSON object, or None with the reason in `problems`."""
    if data is None:
        return None

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON; use null or a number")

    def pairs(items: list[tuple[str, Any]]) -> Json:
        value = dict(items)
        if len(value) < len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            problems.append(Problem(part, f"the key {twice!r} stands twice", field=twice))
        return value

    found = len(problems)
    text = _parse_text(part, data, problems)
    if len(problems) > found:
        return None
    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        if error.msg.startswith(("Expecting property name", "Illegal trailing comma")):
            message += "; is there a comma too many, or a quote that is not double?"
        problems.append(Problem(part, message, error.lineno, error.colno, status=400))
        return None
    except ValueError as error:
        at = re.search(r"\b(NaN|-?Infinity)\b", text)
        line = 1 + text.count("\n", 0, at.start()) if at else None
        problems.append(Problem(part, f"not JSON: {error}", line, status=400))
        return None
    except RecursionError:
        problems.append(Problem(part, f"nested deeper than {limits.depth} levels"))
        return None
    if not isinstance(value, dict):
        problems.append(Problem(part, f"must be a JSON object, not {_json_type(value)}"))
        return None
    if problem := _value_problem(value, limits.depth, part):
        problems.append(problem)
        return None
    return value


def _json_type(value: Any) -> str:
    """What JSON calls the type of `value`."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return "a string"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return "a number"


def _value_problem(
    value: Any, depth: int, part: str, line: int | None = None, path: str = ""
) -> Problem | None:
    """The first thing in a parsed value that cannot be sent on as JSON, or is nested too deeply."""
    stack: list[tuple[Any, str, int]] = [(value, path, 0)]
    while stack:
        value, path, level = stack.pop()
        if isinstance(value, dict | list):
            if level >= depth:
                return Problem(part, f"nested deeper than {depth} levels", line, field=path[:200])
            items: Iterable[tuple[Any, Any]] = (
                value.items() if isinstance(value, dict) else enumerate(value)
            )
            for key, item in items:
                if isinstance(key, str) and not _encodable(key):
                    return Problem(part, "a key with a lone surrogate is not text", line)
                stack.append((item, f"{path}.{key}".lstrip("."), level + 1))
        elif isinstance(value, str) and not _encodable(value):
            return Problem(part, "a lone surrogate is not text", line, field=path)
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            message = "an integer of more than 64 bits; write it as a string"
            return Problem(part, message, line, field=path)
        elif isinstance(value, float) and value in (float("inf"), float("-inf")):
            return Problem(part, "a number too large for JSON readers", line, field=path)
    return None


def _encodable(text: str) -> bool:
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _tuned(value: Any, tune: Json) -> Any:
    """`value` with every string that is exactly `$env_NAME` replaced by `tune["NAME"]`."""
    if isinstance(value, dict):
        return {key: _tuned(item, tune) for key, item in value.items()}
    if isinstance(value, list):
        return [_tuned(item, tune) for item in value]
    if isinstance(value, str) and (match := _ENV.fullmatch(value)):
        return tune.get(match[1], value)
    return value


def _section(template: Json | None, name: str, problems: list[Problem]) -> Json:
    """One of the template's three objects; {} with a problem where it is not one."""
    if template is None:
        return {}
    value = template.get(name)
    if isinstance(value, dict):
        return value
    wrong = "is missing" if name not in template else f"is {_json_type(value)}"
    problems.append(Problem("configtemplate", f"{name} {wrong}; it must be an object", field=name))
    return {}


def _run_message(values: Json, new_run_id: str, limits: Limits, problems: list[Problem]) -> Json:
    """The settings of the run, with something usable in place of what is wrong."""
    known: Json = {
        "image_version": "latest",
        "agent_cpu": "500m",
        "agent_memory": "512Mi",
        **values,
        "run_id": new_run_id if values.get("run_id") is None else values["run_id"],
    }
    settings: Json = {}

    def bad(key: str, must: str) -> None:
        if values:  # else the whole section is missing, which has been said
            got = f"not {_shown(known[key])}" if key in known else "but is missing"
            message = f"{key} must be {must}, {got}"
            problems.append(Problem("configtemplate", message, field=f"run_message.{key}"))

    def text(key: str, pattern: re.Pattern[str], must: str) -> None:
        value = known.get(key)
        right = isinstance(value, str) and pattern.fullmatch(value) is not None
        settings[key] = value if right else "x"
        if not right:
            bad(key, must)

    def count(key: str, name: str, limit: int, hint: str) -> None:
        value: Any = known.get(key)
        right = type(value) is int and value >= 1
        settings[name] = value if right and value <= limit else 1
        if not right:
            bad(key, "an integer from 1, without quotes")
        elif value > limit:
            bad(key, f"at most {limit} here ({hint})")

    label = 'a DNS label (lower-case letters, digits and "-", at most 63 characters)'
    text("run_id", _DNS_LABEL, label)
    text("image_name", _DNS_LABEL, label)
    text("image_version", _TAG, "a Docker tag in quotes")
    for key, example in (("agent_cpu", "500m"), ("agent_memory", "512Mi")):
        text(key, _QUANTITY, f'a Kubernetes quantity in quotes such as "{example}"')
        if not re.search("[1-9]", re.split("[eE]", settings[key])[0]) and settings[key] != "x":
            bad(key, "more than zero")
    count("number_of_agents", "agents", limits.agents, limits.agents_hint)
    count("number_of_jobs", "jobs", limits.jobs, "ask the operator to raise MAX_JOBS")
    name = f"{settings['image_name']}-{settings['run_id']}-{settings['agents'] - 1}"
    if len(name) > 63:
        message = (
            f"image_name, run_id and the last agent's index make the host name {name}, of "
            f"{len(name)} characters; Kubernetes allows 63"
        )
        problems.append(Problem("configtemplate", message, field="run_message.run_id"))
    return settings


def _shown(value: Any) -> str:
    """A value for an error message, shortened where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_code(code: Any, posted: bool, problems: list[Problem]) -> None:
    """Add a problem where the default script is missing or does not compile."""
    name = "default_agent_message.code"
    if code is None:
        message = f"no script: send the part python_code, or put one into {name}"
        problems.append(Problem("python_code", message))
    elif posted:
        if problem := _code_problem(code, "python_code"):
            problems.append(problem)
    elif problem := _code_problem(code, "configtemplate", None, name):
        problems.append(problem)


def _code_problem(
    code: Any, part: str, line: int | None = None, field: str | None = None
) -> Problem | None:
    """Why a script cannot be executed, or None. `line` is the row it stands in, where in a CSV."""
    if not isinstance(code, str):
        return Problem(part, f"code must be a string, not {_json_type(code)}", line, field=field)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, part, "exec", dont_inherit=True)
    except SyntaxError as error:
        message = f"the script does not compile: {error.msg} (line {error.lineno})"
        if line is None and field is None:
            return Problem(part, message, error.lineno, error.offset, field)
        return Problem(part, message, line, field=field)
    except (RecursionError, MemoryError, ValueError, OverflowError) as error:
        message = f"the script does not compile: {str(error) or type(error).__name__}"
        return Problem(part, message, line, field=field)
    return None


# The CSV files


def _read_rows(data: bytes, offset: int) -> Iterator[tuple[int, int, int, list[str]]]:
    """Rows of a CSV from `offset` on: line number, offset, offset behind it, cells.

    Raises `csv.Error` and `UnicodeDecodeError`. Blank lines are passed over.
    """
    file = io.BytesIO(data)
    file.seek(offset)
    fresh = True

    def lines() -> Iterator[str]:
        nonlocal fresh
        for line in file:
            # Inside a quoted cell that goes on over lines, brackets are just text.
            text = line.decode()
            if fresh and _BARE_JSON.search(line):
                text = _quote_json(text)
            fresh = False
            yield text

    bare_json = _BARE_JSON.search(data, offset) is not None if offset == 0 else True
    source = lines() if bare_json else map(bytes.decode, file)
    reader = csv.reader(source, strict=True, skipinitialspace=True)
    start = offset
    for cells in reader:
        end = file.tell()
        if cells:
            yield reader.line_num, start, end, cells
        start, fresh = end, True


def _quote_json(line: str) -> str:
    """A CSV line with cells that are bare JSON (`0,{"a": 1, "b": 2}`) quoted as CSV wants it."""
    cells, at = [], 0
    while True:
        start = at + len(line[at:]) - len(line[at:].lstrip(" \t"))
        match = _CELL.match(line, at)
        assert match is not None  # it matches the empty string
        cell, at = match[0], match.end()
        if line[start : start + 1] in ("{", "["):
            try:
                _, end = _JSON_DECODER.raw_decode(line, start)
            except (ValueError, RecursionError):
                end = -1
            rest = line[end:].lstrip(" \t\r\n")
            if end >= 0 and (not rest or rest.startswith(",")):
                cell = '"' + line[start:end].replace('"', '""') + '"'
                at = len(line) - len(rest) if rest else len(line)
        cells.append(cell)
        if line[at : at + 1] != ",":
            return ",".join(cells) + "\n"
        at += 1


def _cell_value(cell: str) -> Any:
    """A cell's value: parsed where it is a JSON object or array, else the string itself."""
    if cell[0] not in "{[":
        return cell
    try:
        # orjson makes floats of integers above 64 bits; json keeps them, and they are refused.
        value = json.loads(cell) if _LONG_NUMBER.search(cell) else orjson.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return _parse_nested(value)


def _parse_nested(value: Any) -> Any:
    """`value` with the strings in it that are JSON objects or arrays parsed too."""
    if isinstance(value, dict):
        return {key: _parse_nested(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_parse_nested(item) for item in value]
    if isinstance(value, str) and (stripped := value.strip())[:1] in ("{", "["):
        parsed = _cell_value(stripped)
        return value if isinstance(parsed, str) else parsed
    return value


def _read_overrides(
    messages: Messages,
    data: bytes,
    limits: Limits,
    problems: list[Problem],
    warned: list[str],
) -> None:
    """Find the row of each message, and everything that is wrong with the file.

    Only the offset of each row is kept; the row is read again when its message is made.
    """
    part = messages.part
    start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    data = data[start:] if start else data
    if not data.strip():
        return
    if problem := _encoding_problem(part, data):
        problems.append(problem)
        return
    messages.data = data
    line = 0
    rows = _read_rows(data, 0)
    try:
        line, _, _, header = next(rows)
        messages.columns = [column.strip() for column in header]
        found = _header_problems(messages, line, limits)
        problems += found
        if found:
            return
        selected = _Selected(messages, limits, problems)
        for line, offset, end, cells in rows:
            selected.add(line, offset, end, cells)
        selected.finish(line, warned)
    except UnicodeDecodeError as error:
        problems.append(_not_utf8(part, error, line + 1))
    except csv.Error as error:
        message = str(error)
        if "unexpected end of data" in message:
            message = "a quote opens here or below and never closes"
        elif "expected after" in message:
            message = 'text after a closing quote; inside a quoted cell, write " as ""'
        problems.append(Problem(part, message, line + 1))


def _encoding_problem(part: str, data: bytes) -> Problem | None:
    if problem := _utf16(part, data):
        return problem
    if b"\0" in data:
        line = 1 + data.count(b"\n", 0, data.index(b"\0"))
        return Problem(part, "a NUL byte; save the file as CSV in UTF-8", line)
    if b"\r" in data and (bare := re.search(rb"\r(?!\n)", data)):
        line = 1 + data.count(b"\n", 0, bare.start())
        return Problem(part, "a carriage return without line feed; end lines with LF or CRLF", line)
    return None


def _header_problems(messages: Messages, line: int, limits: Limits) -> list[Problem]:
    """What is wrong with the column names."""
    part, columns = messages.part, messages.columns
    if len(columns) == 1 and (";" in columns[0] or "\t" in columns[0]):
        found = "semicolons" if ";" in columns[0] else "tabs"
        message = f"the columns are separated by {found}; save the file with commas"
        return [Problem(part, message, line)]
    if len(columns) > limits.columns:
        message = f"{len(columns)} columns; at most {limits.columns} are allowed (MAX_COLUMNS)"
        return [Problem(part, message, line)]
    problems = []
    for number, column in enumerate(columns, 1):
        if not column:
            message = f"column {number} has no name; name it or delete it"
            problems.append(Problem(part, message, line))
        elif column == "run_id":
            message = "run_id cannot be overridden; remove the column"
            problems.append(Problem(part, message, line, field=column))
        elif column in columns[: number - 1]:
            message = f"the column {column!r} stands twice"
            problems.append(Problem(part, message, line, field=column))
    return problems


class _Selected:
    """Which row belongs to which message, while the rows of a CSV go by."""

    def __init__(self, messages: Messages, limits: Limits, problems: list[Problem]) -> None:
        self.messages, self.limits, self.problems = messages, limits, problems
        columns = messages.columns
        self.column = columns.index(messages.target) if messages.target in columns else None
        # One place more than there are messages: a file may count from 1.
        self.rows = array("q", [-1]) * (messages.count + 1)
        self.number = 0
        self.highest = -1
        self.outside = 0
        self.rest = 6 * len(orjson.dumps(messages.make(0, {}))) + 64 * len(columns)

    def add(self, line: int, offset: int, end: int, cells: list[str]) -> None:
        """Take one row. What is wrong with it goes to the problems."""
        messages, column = self.messages, self.column
        part = messages.part
        if len(cells) > len(messages.columns):
            message = (
                f"{len(cells)} cells in {len(messages.columns)} columns; quote cells with commas"
            )
            self.problems.append(Problem(part, message, line))
            return
        if column is None:
            index = self.number
            self.number += 1
        else:
            target = cells[column].strip() if column < len(cells) else ""
            if (target.isdecimal() and target.isascii() and len(target) < 19) or _INTEGER.fullmatch(
                target
            ):
                index = int(target)
            else:
                if target or any(cell.strip() for cell in cells):
                    message = f"the target {target[:80]!r} is not a whole number"
                    self.problems.append(Problem(part, message, line, field=messages.target))
                return
        if self.suspicious(end - offset, cells):
            problem = _message_problem(messages, self.made(line, cells), self.limits, part, line)
            if problem:
                self.problems.append(problem)
        self.highest = max(self.highest, index)
        if not 0 <= index <= messages.count:
            self.outside += 1
        elif self.rows[index] >= 0:
            message = f"a second row for {messages.target} {index}"
            self.problems.append(Problem(part, message, line, field=messages.target))
        else:
            self.rows[index] = offset

    def suspicious(self, size: int, cells: list[str]) -> bool:
        """Whether the message must be made to see if it is within the limits.

        A cell's JSON is at most six times as long as the cell (a control character becomes
        `\\u0000`), and as deep as it has opening brackets.
        """
        if 6 * size + self.rest > self.limits.message:
            return True
        if "code" in self.messages.columns and self.messages.appended:
            return True
        for cell in cells:
            if cell[:1] in ("{", "["):
                if cell.count("{") + cell.count("[") >= self.limits.depth:
                    return True
                if _LONG_NUMBER.search(cell) or "\\u" in cell:
                    return True
        return False

    def made(self, line: int, cells: list[str]) -> Json:
        """The row's message; a `code` that is no string or does not compile is a problem."""
        messages = self.messages
        override = messages.override(cells)
        code = override.get("code")
        if messages.appended and code is not None:
            problem = _code_problem(code, messages.part, line, "code")
            if problem:
                self.problems.append(problem)
                override = {key: value for key, value in override.items() if key != "code"}
        return messages.make(0, override)

    def finish(self, line: int, warned: list[str]) -> None:
        """Settle from where the file counts, and say what it holds in vain."""
        messages = self.messages
        count, part = messages.count, messages.part
        if self.column is not None and self.rows[0] < 0 and self.highest == count:
            del self.rows[0]
            warned.append(f"{part}: {messages.target} is counted from 1 in this file, taken so")
        else:
            self.outside += self.rows.pop() >= 0
        if self.outside:
            what = "row targets" if self.outside == 1 else "rows target"
            warned.append(f"{part}: {self.outside} {what} no index below {count}, ignored")
        messages.rows = self.rows


def _message_problem(
    messages: Messages, message: Json, limits: Limits, part: str, line: int | None = None
) -> Problem | None:
    """Why a merged message cannot be sent, or None."""
    if problem := _value_problem(message, limits.depth, part, line):
        return problem
    size = len(orjson.dumps(message))
    if size > limits.message:
        text = (
            f"the merged message has {size} bytes; at most {limits.message} are allowed "
            "(MAX_MESSAGE_BYTES)"
        )
        return Problem(part, text, line, field=messages.target, status=413)
    return None
