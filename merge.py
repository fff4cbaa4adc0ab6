"""What a client posts goes in; a `Run`, or every problem found, comes out.

Nothing here touches anything but its arguments: no environment, no clock, no network, no file.
Same input, same output. The rows of a CSV are read and judged once; a message is made when it is
asked for, one at a time, and shares with the default whatever it does not override.
"""

import codecs
import csv
import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn

import orjson

type Json = dict[str, Any]

PARTS = (
    "configtemplate",
    "data_job",
    "data_agent",
    "python_code",
    "requirements_txt",
    "configtune",
)
TASK = "tasks.consume_message"  # that agents' scripts register, and that jobs are sent to
MAX_PROBLEMS = 1000  # an answer lists as many; a file with more has one cause, not a thousand

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/, those above 0
_QUANTITY = re.compile(
    r"\+?(?=[0-9.]*[1-9])([0-9]+\.?[0-9]*|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?"
)
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*+"|(NaN|-?Infinity)')
_SURROGATE = re.compile("[\ud800-\udfff]")
_BARE_RETURN = re.compile(rb"\r(?!\n)")
# The cells of a CSV line up to the first that begins as JSON does and is not quoted.
_UP_TO_JSON = re.compile(r'(?:[ \t]*+(?:"(?:[^"]|"")*+"[^,]*+|[^"\[{,][^,]*+)?,)*+[ \t]*+(?=[\[{])')
_CELL_END = re.compile(r"[ \t]*(,|\r?\n?$)")
_DECODER = json.JSONDecoder()


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
        names = ("part", "line", "column", "field", "message")
        shown = {name: getattr(self, name) for name in names}
        return {name: value for name, value in shown.items() if value is not None}


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
    depth: int = 64  #: of nested objects and arrays; 250 at most, as orjson writes 254 levels
    agents_hint: str = "ask the operator to raise MAX_AGENTS"  #: what to do about too many agents

    @property
    def text(self) -> int:
        """Of a JSON part, or of one line of a CSV: two messages, and 1 MiB of white space."""
        return 2 * self.message + 2**20


def merge(default: Any, override: Any) -> Any:
    """Merge `override` onto `default`: objects key by key, deeply; anything else replaces.

    Neither argument is modified. Keys that are not overridden keep the default's own values (the
    same objects), and where nothing is overridden the default itself is returned.
    """
    if not (isinstance(default, dict) and isinstance(override, dict)):
        return override
    if not override:
        return default
    merged = {**default, **override}
    for key, value in override.items():
        if type(value) is dict:  # says no in half the time that isinstance takes
            merged[key] = merge(default.get(key), value)
    return merged


@dataclass
class Messages:
    """The agent configs or the job messages of a run: a default, overridden message by message.

    Iterating makes the messages in the order of their index, each a dict of its own whose
    untouched values are the default's.
    """

    default: Json
    target: str  #: the key that carries a message's own index
    count: int
    part: str  #: the CSV
    columns: list[str] = field(default_factory=list)
    #: by index: the cells of the row that overrides it, with NUL between them
    rows: list[bytes | None] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Json]:
        for index, row in enumerate(self.rows or [None] * self.count):
            yield self.make(index, row.decode().split("\0") if row else ())

    def make(
        self, index: int, cells: Iterable[str] = (), loads: Callable[[str], Any] = orjson.loads
    ) -> Json:
        """The message number `index`, its columns overridden by the cells that are not blank."""
        message = self.default.copy()
        for column, cell in zip(self.columns, cells):  # noqa: B905 - a row may be short
            if text := cell.strip():
                value = _parsed(text, loads) if text[0] in "{[" else text
                message[column] = merge(message.get(column), value)
        message[self.target] = index
        return message

    def encode(self, message: Json) -> bytes:
        """`message` as JSON. Long values that it shares with the default are serialised once."""
        if not self._long:
            return orjson.dumps(message)
        default = self.default
        shared = {key: data for key, data in self._long.items() if message[key] is default[key]}
        return orjson.dumps({**message, **shared})

    @cached_property
    def _long(self) -> dict[str, orjson.Fragment]:
        """The default's values as JSON, where that is long enough to be worth it."""
        dumped = {key: orjson.dumps(value) for key, value in self.default.items()}
        return {key: orjson.Fragment(data) for key, data in dumped.items() if len(data) > 500}


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

    @property
    def k8s_job(self) -> str:
        """The name of its Kubernetes Job."""
        return f"{self.image_name}-{self.run_id}"


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
    form = _Form(parts, replace(limits, depth=min(limits.depth, 250)))
    for name in ("configtemplate", "data_job", "data_agent"):
        if name not in parts:
            form.add(name, f"the part {name} is missing")
    template, tune = form.json("configtemplate"), form.json("configtune")
    if template and tune:
        template = _tuned(template, tune)
    settings, agents, jobs = _run_message(form, _section(form, template, "run_message"), new_run_id)
    run_id, ending = settings["run_id"], isolation(settings["run_id"])
    config = _with_code(form, _section(form, template, "default_agent_message"), ending)
    job = _section(form, template, "default_job_message") or {}
    configs = Messages({**config, "run_id": run_id}, "targetted_agent", agents, "data_agent")
    job_messages = Messages({**job, "run_id": run_id}, "targetted_job", jobs, "data_job")
    for messages, name in (
        (configs, "default_agent_message"),
        (job_messages, "default_job_message"),
    ):
        if not _check_message(form, messages.make(0), "configtemplate", path=name):
            messages.default = {}  # its rows are judged all the same
        _read_overrides(form, messages, ending)
    requirements = form.text("requirements_txt") or ""
    if form.problems:
        raise Invalid(form.problems)
    return Run(
        **settings,
        requirements=requirements if requirements.strip() else "",
        configs=configs,
        jobs=job_messages,
        warnings=form.warnings,
    )


@dataclass(slots=True)
class _Form:
    """The parts that were posted, and what has been found wrong with them."""

    parts: Mapping[str, bytes]
    limits: Limits
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, part: str, message: str, line: int | None = None, **more: Any) -> None:
        """Note a `Problem`, cut short where it quotes much. Raises `Invalid` at one too many."""
        if len(self.problems) == MAX_PROBLEMS:
            left = Problem(part, f"there are more problems than the {MAX_PROBLEMS} listed")
            raise Invalid([*self.problems, left])
        if more.get("field"):
            more["field"] = _quoted(more["field"])
        self.problems.append(Problem(part, _quoted(message), line, **more))

    def text(self, part: str, status: int = 422) -> str | None:
        """A part as text, "" where it was not posted; None with a problem where it is not text."""
        data = self.parts.get(part, b"").removeprefix(codecs.BOM_UTF8)
        try:
            text = data.decode()
            if "\0" not in text:
                return text
            at, message = data.index(b"\0"), "a NUL byte; save the file as plain text in UTF-8"
        except UnicodeDecodeError as error:
            at = error.start
            message = f"byte 0x{data[at]:02x} is not UTF-8; save the file as UTF-8"
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                message = "the file is UTF-16; save it as UTF-8"
        line, start = 1 + data.count(b"\n", 0, at), 1 + data.rfind(b"\n", 0, at)
        self.add(part, message, line, column=1 + len(data[start:at].decode()), status=status)
        return None

    def json(self, part: str) -> Json | None:
        """A part as a JSON object; None where it was not posted, or cannot be one (a problem)."""
        size, limit = len(self.parts.get(part, b"")), self.limits.text
        if size > limit:
            message = f"{size} bytes; at most {limit} are allowed (MAX_MESSAGE_BYTES)"
            self.add(part, message, status=413)
            return None
        text = self.text(part, 400)
        if text == "" and part in self.parts and part != "configtune":
            self.add(part, "the file is empty; it must be a JSON object", status=400)
        if not text:
            return None

        def pairs(items: list[tuple[str, Any]]) -> Json:
            value = dict(items)
            if len(value) < len(items):
                for name, times in Counter(name for name, _ in items).items():
                    if times > 1:
                        self.add(part, f"the key {name!r} stands {times} times", field=name)
            return value

        try:
            value = _loads(text, pairs)
        except RecursionError:
            self.add(part, f"nested deeper than {self.limits.depth} levels")
            return None
        except ValueError as error:
            if not isinstance(error, json.JSONDecodeError):  # `_refuse` is not told where it is
                at = next(match.start() for match in _CONSTANT.finditer(text) if match[1])
                error = json.JSONDecodeError(str(error), text, at)
            message = f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
            if error.msg.startswith(("Expecting property", "Expecting value", "Illegal")):
                message += "; is there a comma too many, or a quote that is not double?"
            self.add(part, message, error.lineno, column=error.colno, status=400)
            return None
        if not isinstance(value, dict):
            self.add(part, f"must be a JSON object, not {_json_type(value)}")
            return None
        return value if _check_value(self, value, part) else None


def _quoted(text: str) -> str:
    return text[:400].encode(errors="backslashreplace").decode()


# JSON


def _loads(text: str, pairs: Callable[[list[tuple[str, Any]]], Json] | None = None) -> Any:
    """Parse JSON strictly. Numbers that are too large stay so, for `_check_value` to find."""
    return json.loads(
        text,
        object_pairs_hook=pairs,
        parse_constant=_refuse,
        parse_int=lambda digits: int(digits[:30]),
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON; use null or a number")


def _json_type(value: Any) -> str:
    """What JSON calls the type of `value`."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {str: "a string", dict: "an object", list: "an array"}
    return names.get(type(value), "a number")


def _check_value(
    form: _Form, value: Any, part: str, line: int | None = None, path: str = "", level: int = 0
) -> bool:
    """Whether a parsed value can be sent on as JSON; what cannot is noted."""
    known, wrong = len(form.problems), ""
    if isinstance(value, dict | list):
        items: Iterable[tuple[Any, Any]]
        items = value.items() if isinstance(value, dict) else enumerate(value)
        if level >= form.limits.depth:
            wrong, items = f"nested deeper than {form.limits.depth} levels", ()
        for key, item in items:
            where = f"{path}.{key}" if path else str(key)
            _check_value(form, key, part, line, where)
            _check_value(form, item, part, line, where[:300], level + 1)  # a key may be very long
    elif isinstance(value, str):
        if not value.isascii() and _SURROGATE.search(value):
            wrong = "a lone surrogate is not text"
    elif isinstance(value, float):
        if math.isinf(value):
            wrong = "a number too large; write it as a string"
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        wrong = "an integer of more than 64 bits; write it as a string"
    if wrong:
        form.add(part, wrong, line, field=path)
    return len(form.problems) == known


def _check_message(
    form: _Form, message: Json, part: str, line: int | None = None, path: str = ""
) -> bool:
    """Whether a merged message can be sent; if not, why is noted."""
    if not _check_value(form, message, part, line, path):
        return False
    size, limit = len(orjson.dumps(message)), form.limits.message
    if size > limit:
        text = f"the merged message has {size} bytes; at most {limit} are allowed"
        form.add(part, f"{text} (MAX_MESSAGE_BYTES)", line, field=path or None, status=413)
    return size <= limit


# The template


def _section(form: _Form, template: Json | None, name: str) -> Json | None:
    """One of the template's three objects; None with a problem where it is not one."""
    if template is None:
        return None
    value = template.get(name)
    if isinstance(value, dict):
        return value
    wrong = f"is {_json_type(value)}" if name in template else "is missing"
    form.add("configtemplate", f"{name} {wrong}; it must be an object", field=name)
    return None


def _tuned(value: Any, tune: Json) -> Any:
    """`value` with every string that is exactly `$env_NAME` replaced by `tune["NAME"]`."""
    if isinstance(value, dict):
        return {key: _tuned(item, tune) for key, item in value.items()}
    if isinstance(value, list):
        return [_tuned(item, tune) for item in value]
    if isinstance(value, str) and value.startswith("$env_"):
        return tune.get(value.removeprefix("$env_"), value)
    return value


def _run_message(
    form: _Form, values: Json | None, new_run_id: str
) -> tuple[dict[str, str], int, int]:
    """The run's settings, agents and jobs, with something usable in place of what is wrong."""
    known: Json = {"image_version": "latest", "agent_cpu": "500m", "agent_memory": "512Mi"}
    known |= values or {}
    if known.get("run_id") is None:
        known["run_id"] = new_run_id

    def bad(key: str, must: str) -> None:
        if values is not None:  # else that has been said
            got = f"not {json.dumps(known[key])[:80]}" if key in known else "but is missing"
            message = f"{key} must be {must}, {got}"
            form.add("configtemplate", message, field=f"run_message.{key}")

    def text(key: str, pattern: re.Pattern[str], must: str) -> str:
        value = known.get(key)
        if isinstance(value, str) and pattern.fullmatch(value):
            return value
        bad(key, must)
        return "x"

    def count(key: str, limit: int, hint: str) -> int:
        value = known.get(key)
        if type(value) is not int or value < 1:
            bad(key, "an integer from 1, without quotes")
        elif value > limit:
            bad(key, f"at most {limit} here ({hint})")
        else:
            return value
        return 1

    label = 'a DNS label in quotes (lower-case letters, digits and "-", at most 63 characters)'
    quantity = "a Kubernetes quantity above zero, in quotes, such as"
    settings = {
        "run_id": text("run_id", _DNS_LABEL, label),
        "image_name": text("image_name", _DNS_LABEL, label),
        "image_version": text("image_version", _TAG, "a Docker tag in quotes"),
        "agent_cpu": text("agent_cpu", _QUANTITY, f'{quantity} "500m"'),
        "agent_memory": text("agent_memory", _QUANTITY, f'{quantity} "512Mi"'),
    }
    agents = count("number_of_agents", form.limits.agents, form.limits.agents_hint)
    jobs = count("number_of_jobs", form.limits.jobs, "ask the operator to raise MAX_JOBS")
    name = f"{settings['image_name']}-{settings['run_id']}-{agents - 1}"
    if len(name) > 63:
        message = (
            f"image_name, run_id and the last agent's index make the host name {name}, of "
            f"{len(name)} characters; Kubernetes allows 63"
        )
        form.add("configtemplate", message, field="run_message.run_id")
    return settings, agents, jobs


def _with_code(form: _Form, config: Json | None, ending: str) -> Json:
    """The default agent config with the script that was posted, or else its own."""
    script = form.text("python_code")
    if script and script.strip():
        if _check_code(form, script, "python_code"):
            if TASK not in script:
                message = f"python_code: the script never names {TASK}; will agents know the jobs?"
                form.warnings.append(message)
            return {**(config or {}), "code": script + ending}
    elif script is not None and config is not None:
        name, code = "default_agent_message.code", config.get("code")
        if code is None:
            form.add("python_code", f"no script: send the part python_code, or put one into {name}")
        elif _check_code(form, code, "configtemplate", None, name):
            return {**config, "code": code + ending}
    return config or {}


def _check_code(
    form: _Form, code: Any, part: str, line: int | None = None, field: str | None = None
) -> bool:
    """Whether a script can be executed; if not, why is noted. `line` is its row's, in a CSV."""
    if not isinstance(code, str):
        form.add(part, f"code must be a string, not {_json_type(code)}", line, field=field)
        return False
    column = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, part, "exec", dont_inherit=True)
        return True
    except SyntaxError as error:
        message = f"{error.msg} (line {error.lineno or 1})"
        if field is None:
            line, column = error.lineno, error.offset
    except (RecursionError, MemoryError, ValueError, OverflowError) as error:
        message = str(error) or type(error).__name__
    message = f"the script does not compile: {message}"
    form.add(part, message, line, column=column, field=field)
    return False


# The CSV files


def _read_overrides(form: _Form, messages: Messages, ending: str) -> None:
    """Find the row of each message, and everything that is wrong with the file."""
    part, target, count, limits = messages.part, messages.target, messages.count, form.limits
    if not _is_csv(form, part):
        return
    known, table = len(form.problems), _rows(form, part)
    line, header = next(table, (1, []))
    columns = messages.columns = [column.strip() for column in header]
    if len(form.problems) > known or not _check_columns(form, part, columns, line):
        return
    width, careful = len(columns), _has_odd_json(form.parts[part])
    column = columns.index(target) if target in columns else None
    if column is None and (like := [name for name in columns if name.startswith("target")]):
        message = f"{part}: {like[0]!r} is taken for a key of the message; rows are selected by"
        form.warnings.append(f"{message} {target!r}, and here by their position")
    code = columns.index("code") if part == "data_agent" and "code" in columns else None
    # A character of a cell makes at most six of JSON, and a level takes two characters: rows that
    # are shorter need not be merged to see that their message is within the limits.
    short = (limits.message - len(orjson.dumps([messages.make(0), columns])) - 20) // 6
    shallow = 2 * limits.depth - 1
    # One place more than there are messages: a file may count from 1.
    rows: list[bytes | None] = [None] * (count + 1)
    position = highest = -1
    outside = 0
    for line, cells in table:
        if len(cells) > width:
            message = f"{len(cells)} cells in {width} columns; quote cells with commas"
            form.add(part, message, line)
            continue
        if column is None:
            index = position = position + 1
        else:
            cell = cells[column] if column < len(cells) else ""
            try:
                index = int(cell)
            except ValueError:
                if any(map(str.strip, cells)):
                    message = f"the target {cell.strip()[:80]!r} is not a whole number"
                    form.add(part, message, line, field=target)
                continue
            cells[column] = ""  # a message has its index anyway
        if index > highest:
            highest = index
        if not 0 <= index <= count:
            outside += 1
            continue
        if rows[index] is not None:
            form.add(part, f"a second row for {target} {index}", line, field=target)
        if code is not None and code < len(cells):
            cells[code] = _ended_script(form, cells[code].strip(), line, ending)
        row = "\0".join(cells)
        rows[index] = row.encode()
        if (
            len(row) > short
            or (len(row) > shallow and row.count("{") + row.count("[") >= limits.depth)
            or (careful and ("{" in row or "[" in row))
        ):
            _check_row(form, messages, line, cells)
    if column is not None and rows[0] is None and highest == count:
        form.warnings.append(f"{part}: {target} is counted from 1 in this file, taken so")
        messages.rows = rows[1:]
    else:
        outside += rows[count] is not None
        messages.rows = rows[:count]
    if outside:
        what = "row targets" if outside == 1 else "rows target"
        form.warnings.append(f"{part}: {outside} {what} no index below {count}, ignored")


def _is_csv(form: _Form, part: str) -> bool:
    """Whether a part holds anything, and may be CSV; what speaks against it is noted."""
    data, limit = form.parts.get(part, b""), form.limits.text
    if not data or data.isspace():
        return False
    if 0 in data or not _is_utf8(data):
        form.text(part)  # notes what it is and where
        return False
    if b"\r" in data and (bare := _BARE_RETURN.search(data)):
        line = 1 + data.count(b"\n", 0, bare.start())
        form.add(part, "a carriage return without line feed; end lines with LF or CRLF", line)
        return False
    if len(data) > limit:
        for line, text in enumerate(io.BytesIO(data), 1):
            if len(text) > limit:
                message = f"{len(text)} bytes; at most {limit} are allowed (MAX_MESSAGE_BYTES)"
                form.add(part, message, line, status=413)
                return False
    return True


def _is_utf8(data: bytes) -> bool:
    """Looks at 1 MiB at a time: all of it as a string might take four times the memory."""
    blocks = (data[at : at + 2**20] for at in range(0, len(data), 2**20))
    try:
        return all(True for _ in codecs.iterdecode(blocks, "utf-8"))
    except UnicodeDecodeError:
        return False


def _check_columns(form: _Form, part: str, columns: list[str], line: int) -> bool:
    """Whether the column names are right; what is wrong with them is noted."""
    known, limit = len(form.problems), form.limits.columns
    if len(columns) == 1 and (";" in columns[0] or "\t" in columns[0]):
        found = "semicolons" if ";" in columns[0] else "tabs"
        form.add(part, f"the columns are separated by {found}; save the file with commas", line)
    elif len(columns) > limit:
        form.add(part, f"{len(columns)} columns; at most {limit} are allowed (MAX_COLUMNS)", line)
    else:
        for number, column in enumerate(columns, 1):
            if not column:
                form.add(part, f"column {number} has no name; name it or delete it", line)
            elif column == "run_id":
                form.add(part, "run_id cannot be overridden; remove it", line, field=column)
            elif column in columns[: number - 1]:
                form.add(part, f"the column {column!r} stands twice", line, field=column)
    return len(form.problems) == known


def _has_odd_json(data: bytes) -> bool:
    """Whether JSON in a CSV may hold what cannot be sent on: large numbers, lone surrogates.

    What is rare is looked for in the whole file at once, which costs its rows nothing: 19 digits
    in a row, an exponent of three, an escape by number.
    """
    zeros = data.translate(bytes.maketrans(b"123456789E", b"000000000e"), b"+")
    return b"0" * 19 in zeros or b"e000" in zeros or (b"\\" in zeros and b"\\u" in zeros)


def _ended_script(form: _Form, script: str, line: int, ending: str) -> str:
    """An agent's own script with the line that ends every script; "" where it has none."""
    code = _parsed(script, _loads) if script.startswith(("{", "[")) else script
    if script and _check_code(form, code, "data_agent", line, "code"):
        return script + ending
    return ""


def _check_row(form: _Form, messages: Messages, line: int, cells: list[str]) -> None:
    """Note what keeps a row's message from being sent."""
    try:
        _check_message(form, messages.make(0, cells, _loads), messages.part, line)
    except RecursionError:
        form.add(messages.part, f"nested deeper than {form.limits.depth} levels", line)


def _rows(form: _Form, part: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV that are not blank, each with the number of its first line.

    What is not CSV is noted. Cells of JSON may stand without quotes.
    """
    data = form.parts[part].removeprefix(codecs.BOM_UTF8)
    bare = b",{" in data.translate(bytes.maketrans(b"[\n", b"{,"), b" \t")
    file = io.BytesIO(data)
    fresh = True  # whether the next line begins a row, or goes on within quotes

    def lines() -> Iterator[str]:
        nonlocal fresh
        for line in map(bytes.decode, file):
            text = line
            if "{" in line or "[" in line:
                text = _quote_json(line) if fresh else _quote_json('"' + line)[1:]
            fresh = False
            yield text

    csv.field_size_limit(form.limits.text)  # a setting of the process, the same for all
    source = lines() if bare else map(bytes.decode, file)
    reader = csv.reader(source, strict=True, skipinitialspace=True)
    line = 1
    while True:
        try:
            for cells in reader:
                if cells:
                    yield line, cells
                line, fresh = reader.line_num + 1, True
            return
        except csv.Error as error:
            if "expected after" not in str(error):  # the end of the file, or of what a cell may be
                return form.add(part, "a quote opens in this row and never closes", line)
            message = 'text between a closing quote and a comma; inside quotes, write " as ""'
            form.add(part, message, line)
            line, fresh = reader.line_num + 1, True


def _quote_json(line: str) -> str:
    """A CSV line whose cells of bare JSON (`0,{"a": 1, "b": 2}`) are quoted as CSV wants it."""
    done, at, vain = "", 0, 0
    # What only begins as JSON does is read in vain, and what it holds again: not without end.
    while vain <= 10 * len(line) and (bare := _UP_TO_JSON.match(line, at)):
        start, ended = bare.end(), None
        try:
            _, end = _DECODER.raw_decode(line, start)
            ended = _CELL_END.match(line, end)
        except json.JSONDecodeError as error:
            end = len(line) if error.msg.startswith("Unterminated") else error.pos
        except RecursionError:
            break
        if ended:
            cell = line[start:end].replace('"', '""')
            done += f'{line[at:start].rstrip(" \t")}"{cell}"{ended[1]}'
            at = ended.end()
        else:
            vain += end - start + end // 50  # the error counts lines up to there, a fast thing
            after = line.find(",", start) + 1 or len(line)
            done += line[at:after]
            at = after
    return done + line[at:]


def _parsed(text: str, loads: Callable[[str], Any]) -> Any:
    """The JSON object or array that a text is, or else the text."""
    try:
        value = loads(text)
    except ValueError:
        return text
    # Strings in it that look like JSON are parsed too; mostly it holds no further bracket.
    if text.count("{") + text.count("[") > 1 or "\\" in text:
        return _parsed_within(value, loads)
    return value


def _parsed_within(value: Any, loads: Callable[[str], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _parsed_within(item, loads) for key, item in value.items()}
    if isinstance(value, list):
        return [_parsed_within(item, loads) for item in value]
    if isinstance(value, str) and (stripped := value.strip()).startswith(("{", "[")):
        parsed = _parsed(stripped, loads)
        return value if isinstance(parsed, str) else parsed
    return value
