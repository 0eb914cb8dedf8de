"""What a statement asks of the table, and whether it lets the server prune partitions.

PostgreSQL's own parser (pglast) parses the statement; nothing is run. A partition is pruned when the bare
time column is on one side of ``<``, ``<=``, ``=``, ``>=`` or ``>``, and on the other something known when the
statement begins: a value, a parameter, ``now()``. Conditions reach the table through aliases, joins,
subqueries, common table expressions and views as far as the planner lets them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from typing import Any, NamedTuple

from chronos.errors import RefusedError

_COMPARISONS = {"<", "<=", "=", ">=", ">"}
_NONE: frozenset[_Use] = frozenset()


class Why(Enum):
    """Why no partition is pruned, and what to write instead; ``{c}`` is the time column."""

    NOTHING = "no condition reaches {c}: add AND {c} >= ..., as tight as the caller can"
    KEY = "looks rows up by key alone: pass the time too, AND {c} = ... (or >= ... AND {c} < ...)"
    LIMIT = "stops early, but plans and locks every partition: add AND {c} >= now() - interval '...'"
    FUNCTION = "{c} is inside an expression: compare the bare column, {c} >= ... AND {c} < ..."
    ROW = "a row comparison prunes nothing: add AND {c} >= ... (or <=) with the same value"
    JOIN = "{c} is compared with another column: add AND {c} >= ... with a value"
    OR = "not every arm of the OR bounds {c}: bound it outside the OR, AND {c} >= ..."
    SUBQUERY = "{c} is compared with a subquery, whose result comes too late: pass it as a value"
    VOLATILE = "{c} is compared with a volatile function: use now() or a value"
    OPERATOR = "this operator on {c} prunes nothing: use <, <=, =, >= or >"

    def advice(self, column: str) -> str:
        """The advice, in one line."""
        return self.value.format(c=column)


class Fact(Enum):
    """What changes its meaning or fails on a partitioned table, besides what the checks look for."""

    ONLY = "reads ONLY the table, which has no rows of its own once partitioned"
    COPY_TO = "COPY of the table itself: write COPY (SELECT ...) TO"


class Reading(NamedTuple):
    """What one statement does with the table: whether it ``touches`` it, and ``why`` it prunes no partition.

    ``why`` is None when each mention of the table is bounded, or when there is none.
    """

    touches: bool
    why: Why | None
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Subject:
    """The table, as statements may mention it: ``columns`` in order, and those of its ``key``.

    ``bare``: its name without a schema means it; ``views`` are the definitions of views on it, by schema and
    name; ``bare_views`` those that need no schema; ``volatile`` are the names of volatile functions.
    """

    schema: str
    name: str
    column: str
    type: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    bare: bool = True
    views: Mapping[tuple[str, str], str] = field(default_factory=dict)
    bare_views: Mapping[str, str] = field(default_factory=dict)
    volatile: frozenset[str] = frozenset()

    def is_named(self, schema: str | None, relation: str) -> bool:
        """Whether this name in a statement means the table."""
        return relation == self.name and (schema == self.schema or (schema is None and self.bare))


class UnreadableError(ValueError):
    """The parser does not understand a statement, or the statement is truncated."""


def parser() -> Any:
    """The package pglast. Raises RefusedError, which says how to install it, if it is missing."""
    try:
        import pglast
    except ImportError as error:
        raise RefusedError(
            "reading the statements needs the package pglast: pip install pglast (the extra plan)"
        ) from error
    return pglast


def parse(text: str) -> tuple[Any, ...]:
    """The statements in ``text``. Raises UnreadableError."""
    pglast = parser()
    try:
        return tuple(raw.stmt for raw in pglast.parse_sql(text))
    except pglast.parser.ParseError as error:
        raise UnreadableError(str(error)) from error


def read(text: str, subject: Subject) -> Reading:
    """What a statement asks of the table. Raises UnreadableError, also if it is nested too deeply."""
    analysis = _Analysis(subject)
    try:
        for node in parse(text):
            analysis.statement(node)
    except RecursionError as error:
        raise UnreadableError("nested too deeply") from error
    unbounded = [use for use in analysis.uses if not use.bounded]
    why = min((use.reason() for use in unbounded), key=list(Why).index) if unbounded else None
    return Reading(analysis.touches, why, tuple(dict.fromkeys(analysis.facts)))


def nodes(tree: Any) -> Iterator[Any]:
    """Every node of a tree, parents first."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, tuple | list):
            pending.extend(reversed(node))
        elif _is_node(node):
            yield node
            pending.extend(reversed([getattr(node, member) for member in node]))


def kind(node: Any) -> str:
    """The name of a node's class, as PostgreSQL calls it."""
    return type(node).__name__


def words(names: Any) -> tuple[str, ...]:
    """A qualified name, such as that of a function, in its parts."""
    return tuple(part.sval for part in names or () if kind(part) == "String")


def _is_node(node: Any) -> bool:
    return type(node).__module__.startswith("pglast.ast")


@dataclass(eq=False)
class _Use:
    """One mention of the table that reads its rows."""

    bounded: bool = False
    failed: set[Why] = field(default_factory=set)

    def reason(self) -> Why:
        """The most useful of the reasons why it is not bounded."""
        order = (
            Why.FUNCTION,
            Why.ROW,
            Why.VOLATILE,
            Why.SUBQUERY,
            Why.OR,
            Why.JOIN,
            Why.OPERATOR,
            Why.LIMIT,
            Why.KEY,
        )
        return next((why for why in order if why in self.failed), Why.NOTHING)


_Uses = frozenset[_Use]
# Output columns in order: the name (None where their number is unknown), and the mentions whose time it is.
_Columns = list[tuple[str | None, _Uses]]


@dataclass
class _Item:
    """Something in FROM: its name, its columns, and the mentions of the table in it."""

    name: str | None
    columns: _Columns
    uses: _Uses = _NONE
    is_table: bool = False

    @property
    def known(self) -> bool:
        return all(name is not None for name, _ in self.columns)

    def column(self, name: str) -> _Uses | None:
        """Whose time the column is; None when no such column is known."""
        found = [uses for known, uses in self.columns if known == name]
        return found[0] if found else None


@dataclass
class _Level:
    """One SELECT, UPDATE or DELETE: what is in FROM, and the level around it."""

    outer: _Level | None
    items: list[_Item] = field(default_factory=list)
    # Conditions, each with the mentions that it can bound (None: all).
    conditions: list[tuple[Any, _Uses | None]] = field(default_factory=list)
    same: list[tuple[Any, Any]] = field(default_factory=list)

    def find(self, ref: Any) -> _Uses | None:
        """Whose time a column reference is; None when this level certainly has no such column."""
        if not ref.fields or kind(ref.fields[-1]) != "String":
            return None
        *prefix, column = words(ref.fields)
        if prefix:
            named = [item for item in self.items if item.name == prefix[-1]]
            return (named[0].column(column) or _NONE) if named else None
        found = [uses for item in self.items if (uses := item.column(column)) is not None]
        return _union(found) if found else None

    def is_variable(self, ref: Any) -> bool:
        """Whether it is not a column, but a variable of the function that contains the statement."""
        level: _Level | None = self
        while level is not None:
            if level.find(ref) is not None or not all(item.known for item in level.items):
                return False
            level = level.outer
        return len(ref.fields or ()) == 1 and kind(ref.fields[0]) == "String"


@dataclass
class _Cte:
    """A common table expression: its columns as conditions outside see them."""

    columns: _Columns
    uses: _Uses


_Ctes = Mapping[str, _Cte]


class _Analysis:
    """Walks through one statement and collects each mention of the table."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.uses: list[_Use] = []
        self.facts: list[Fact] = []
        self.touches = False
        self._mentions: Counter[str] = Counter()
        self._views: list[tuple[str | None, str]] = []

    def statement(self, node: Any) -> None:
        """A statement, or one inside another: PREPARE, DECLARE, EXPLAIN, COPY, CREATE TABLE AS."""
        self._mentions += Counter(n.relname for n in nodes(node) if kind(n) == "RangeVar")
        inner = getattr(node, "query", None)
        if kind(node) == "CopyStmt" and inner is None:
            self._copy(node)
        elif kind(node) in (
            "PrepareStmt",
            "DeclareCursorStmt",
            "ExplainStmt",
            "CopyStmt",
            "CreateTableAsStmt",
        ):
            self.statement(inner)
        elif kind(node) in _STATEMENTS:
            self._query(node, {}, None)

    def _copy(self, node: Any) -> None:
        if node.relation is not None and self.subject.is_named(
            node.relation.schemaname, node.relation.relname
        ):
            self.touches = True
            if not node.is_from:
                self.facts.append(Fact.COPY_TO)

    # --- Statements ---

    def _query(self, node: Any, ctes: _Ctes, outer: _Level | None) -> _Columns:
        """A statement that reads or writes; returns the columns that outer conditions can bound."""
        if kind(node) == "SelectStmt":
            return self._select(node, ctes, outer)
        ctes = self._with(node.withClause, ctes, outer)
        if kind(node) == "InsertStmt":
            self._insert(node, ctes)
            return []
        level = _Level(outer)
        self._from(node.relation, level, ctes)
        if kind(node) == "MergeStmt":
            self._from(node.sourceRelation, level, ctes)
            level.conditions.append((node.joinCondition, None))
        else:
            sources = node.fromClause if kind(node) == "UpdateStmt" else node.usingClause
            for source in sources or ():
                self._from(source, level, ctes)
            if node.whereClause is not None:
                level.conditions.append((node.whereClause, None))
        self._settle(level)
        parts = [getattr(node, member) for member in node if member not in _FROM_PARTS]
        self._expressions(parts, level, ctes)
        return []

    def _insert(self, node: Any, ctes: _Ctes) -> None:
        if node.selectStmt is not None:
            self._select(node.selectStmt, ctes, None)
        if self.subject.is_named(node.relation.schemaname, node.relation.relname):
            self.touches = True

    def _select(self, node: Any, ctes: _Ctes, outer: _Level | None) -> _Columns:
        ctes = self._with(node.withClause, ctes, outer)
        if node.op.name != "SETOP_NONE":
            left, right = self._select(node.larg, ctes, outer), self._select(node.rarg, ctes, outer)
            if node.op.name == "SETOP_EXCEPT" or _limits(node):
                return _closed(left)
            return _side_by_side(left, right)
        level = _Level(outer)
        for source in node.fromClause or ():
            self._from(source, level, ctes)
        if node.whereClause is not None:
            level.conditions.append((node.whereClause, None))
        self._settle(level)
        if _limits(node) and node.sortClause and self._is_time(node.sortClause[0].node, level):
            for use in _union(item.uses for item in level.items):
                use.failed.add(Why.LIMIT)
        self._expressions(
            [getattr(node, member) for member in node if member not in _FROM_PARTS], level, ctes
        )
        return self._outputs(node, level)

    def _with(self, clause: Any, ctes: _Ctes, outer: _Level | None) -> _Ctes:
        known = dict(ctes)
        for cte in clause.ctes if clause is not None else ():
            before = len(self.uses)
            if clause.recursive:
                known[cte.ctename] = _Cte([(None, _NONE)], _NONE)
            columns = self._query(cte.ctequery, known, outer)
            forced = cte.ctematerialized.name
            # A materialized one is read as a whole, whatever is selected from it.
            inlined = forced == "CTEMaterializeNever" or (
                forced == "CTEMaterializeDefault" and self._mentions[cte.ctename] == 1
            )
            if clause.recursive or not inlined:
                columns = _closed(columns)
            known[cte.ctename] = _Cte(_renamed(columns, cte.aliascolnames), frozenset(self.uses[before:]))
        return known

    # --- FROM ---

    def _from(self, node: Any, level: _Level, ctes: _Ctes) -> _Uses:
        """Add an item of FROM to the level; return the mentions of the table in it."""
        if kind(node) == "JoinExpr":
            return self._join(node, level, ctes)
        if kind(node) == "RangeTableSample":
            return self._from(node.relation, level, ctes)
        before = len(self.uses)
        if kind(node) == "RangeVar":
            item = self._relation(node, ctes)
        elif kind(node) == "RangeSubselect":
            # A LATERAL subquery sees the items before it.
            item = _Item(None, self._query(node.subquery, ctes, level if node.lateral else level.outer))
        else:
            self._expressions([node], level, ctes)
            item = _Item(None, [(None, _NONE)])
        item.uses |= frozenset(self.uses[before:])
        alias = getattr(node, "alias", None)
        if alias is not None:
            item.name, item.columns = alias.aliasname, _renamed(item.columns, alias.colnames)
        level.items.append(item)
        return item.uses

    def _relation(self, node: Any, ctes: _Ctes) -> _Item:
        subject, schema, name = self.subject, node.schemaname, node.relname
        if schema is None and name in ctes:
            return _Item(name, list(ctes[name].columns), ctes[name].uses)
        if subject.is_named(schema, name):
            self.touches = True
            if not node.inh:
                self.facts.append(Fact.ONLY)
            use = _Use()
            self.uses.append(use)
            own: _Columns = [
                (c, frozenset((use,)) if c == subject.column else _NONE) for c in subject.columns
            ]
            return _Item(name, own, frozenset((use,)), is_table=True)
        text = subject.views.get((schema, name)) if schema else subject.bare_views.get(name)
        if text is not None and (schema, name) not in self._views:
            self._views.append((schema, name))
            [view] = parse(text)
            columns = self._query(view, {}, None)
            self._views.pop()
            return _Item(name, columns)
        return _Item(name, [(None, _NONE)])

    def _join(self, node: Any, level: _Level, ctes: _Ctes) -> _Uses:
        at = len(level.items)
        left = self._from(node.larg, level, ctes)
        middle = len(level.items)
        right = self._from(node.rarg, level, ctes)
        # The condition of an outer join restricts only the nullable side.
        bounds: dict[str, _Uses | None] = {
            "JOIN_INNER": None,
            "JOIN_LEFT": right,
            "JOIN_RIGHT": left,
            "JOIN_FULL": _NONE,
        }
        join = node.jointype.name
        if node.quals is not None:
            level.conditions.append((node.quals, bounds.get(join, _NONE)))
            self._expressions([node.quals], level, ctes)
        if join == "JOIN_INNER":
            lefts, rights = level.items[at:middle], level.items[middle:]
            for column in words(node.usingClause) if not node.isNatural else (self.subject.column,):
                level.same += [((one, column), (other, column)) for one in lefts for other in rights]
        return left | right

    def _outputs(self, node: Any, level: _Level) -> _Columns:
        columns: _Columns = []
        for target in node.targetList or ():
            value = target.val
            if kind(value) == "ColumnRef" and kind(value.fields[-1]) == "A_Star":
                prefix = words(value.fields)
                for item in level.items:
                    if not prefix or item.name == prefix[-1]:
                        columns += item.columns
            elif kind(value) == "ColumnRef":
                columns.append((target.name or words(value.fields)[-1], level.find(value) or _NONE))
            else:
                name = target.name or (words(value.funcname)[-1] if kind(value) == "FuncCall" else "?column?")
                columns.append((name, _NONE))
        windows = any(n.over is not None for n in nodes(node.targetList) if kind(n) == "FuncCall")
        if _limits(node) or windows:
            return _closed(columns)
        if node.groupClause:
            columns = _only(columns, _grouped(node.groupClause, columns, level))
        if node.distinctClause and kind(node.distinctClause[0]) in _EXPRESSIONS:
            columns = _only(columns, _grouped(node.distinctClause, columns, level))
        return columns

    # --- Conditions ---

    def _expressions(self, parts: Iterable[Any], level: _Level, ctes: _Ctes) -> None:
        """Subqueries in expressions, each a level of its own."""
        pending = list(parts)
        while pending:
            node = pending.pop()
            if isinstance(node, tuple | list):
                pending.extend(node)
            elif kind(node) == "SubLink":
                self._query(node.subselect, ctes, level)
                pending.append(node.testexpr)
            elif _is_node(node) and kind(node) not in ("WithClause", *_STATEMENTS):
                pending.extend(getattr(node, member) for member in node)

    def _settle(self, level: _Level) -> None:
        """Mark the mentions that the conditions of a level bound."""
        for condition, allowed in level.conditions:
            bounded = self._bounds(condition, level, negated=False)
            for use in bounded if allowed is None else bounded & allowed:
                use.bounded = True
        self._settle_equals(level)
        for item in level.items:
            for use in item.uses:
                # For the table itself only: no condition here reaches into a subquery.
                if not use.bounded and item.is_table and self._by_key(level, item):
                    use.failed.add(Why.KEY)

    def _settle_equals(self, level: _Level) -> None:
        """A column that equals a bounded one is bounded too, if every link is ``=``."""
        groups: list[tuple[set[Any], bool]] = []
        for condition, allowed in level.conditions:
            if allowed is not None:
                continue
            for node in _conjuncts(condition):
                if kind(node) == "A_Expr" and node.kind.name == "AEXPR_OP" and words(node.name)[-1] == "=":
                    sides = {self._identity(side, level) for side in (node.lexpr, node.rexpr)} - {None}
                    values = self._is_value(node.lexpr, level) or self._is_value(node.rexpr, level)
                    groups.append((sides, values))
        for one, other in level.same:
            groups.append(({self._of_item(*one), self._of_item(*other)}, False))
        merged = True
        bounded: set[Any] = set().union(*(sides for sides, values in groups if values))
        while merged:
            merged = False
            for sides, _ in groups:
                if sides & bounded and not sides <= bounded:
                    bounded |= sides
                    merged = True
        for key in bounded:
            if isinstance(key, frozenset):
                for use in key:
                    use.bounded = True

    def _identity(self, node: Any, level: _Level) -> Any:
        """What identifies a column: the mentions whose time it is, or its name."""
        if kind(node) != "ColumnRef":
            return None
        uses = level.find(node)
        return uses or words(node.fields)

    def _of_item(self, item: _Item, column: str) -> Any:
        return item.column(column) or (item.name, column)

    def _bounds(self, node: Any, level: _Level, *, negated: bool) -> _Uses:
        """The mentions of the table whose partitions this condition prunes."""
        if kind(node) == "BoolExpr":
            operator = node.boolop.name
            if operator == "NOT_EXPR":
                return self._bounds(node.args[0], level, negated=not negated)
            arms = [self._bounds(arm, level, negated=negated) for arm in node.args]
            if (operator == "AND_EXPR") != negated:
                return _union(arms)
            in_all = reduce(frozenset.__and__, arms)
            for use in _union(arms) - in_all:
                use.failed.add(Why.OR)
            return in_all
        if kind(node) == "NullTest" and node.nulltesttype.name == "IS_NULL" and not negated:
            return self._column(node.arg, level)
        if kind(node) == "SubLink" and node.testexpr is not None:
            self._failed(node.testexpr, level, Why.SUBQUERY)
            return _NONE
        if kind(node) != "A_Expr":
            self._failed(node, level, Why.FUNCTION)
            return _NONE
        return self._comparison(node, level, negated=negated)

    def _comparison(self, node: Any, level: _Level, *, negated: bool) -> _Uses:
        form, operator = node.kind.name, words(node.name)[-1]
        left, right = node.lexpr, node.rexpr
        if form == "AEXPR_OP" and left is not None:
            if negated and operator in ("=", "<>"):
                operator = "<>" if operator == "=" else "="
            return self._pair(operator, left, right, level)
        if form in ("AEXPR_OP_ANY", "AEXPR_OP_ALL") and operator in _COMPARISONS and not negated:
            return self._pair(operator, left, right, level)
        if form == "AEXPR_IN" and (operator == "=") != negated:
            arms = [self._pair("=", left, one, level) for one in right]
            return reduce(frozenset.__and__, arms)
        if form in _BETWEEN:
            ends = [self._pair(o, left, end, level) for o, end in zip((">=", "<="), right, strict=True)]
            in_both = (form == "AEXPR_BETWEEN") == negated or form.endswith("SYM")
            return ends[0] & ends[1] if in_both else _union(ends)
        self._failed(node, level, Why.OPERATOR)
        return _NONE

    def _pair(self, operator: str, left: Any, right: Any, level: _Level) -> _Uses:
        """Both sides of a comparison; either may be the time column."""
        if kind(left) == "RowExpr" and kind(right) == "RowExpr":
            if operator == "=":
                return _union(
                    self._pair("=", one, other, level)
                    for one, other in zip(left.args, right.args, strict=False)
                )
            self._failed((left, right), level, Why.ROW)
            return _NONE
        for column, value in ((left, right), (right, left)):
            uses = self._column(column, level)
            if not uses:
                continue
            if operator not in _COMPARISONS:
                why = Why.OPERATOR
            elif self._is_value(value, level):
                return uses
            elif any(kind(n) == "SubLink" for n in nodes(value)):
                why = Why.SUBQUERY
            elif self._is_volatile(value):
                why = Why.VOLATILE
            else:
                why = Why.JOIN
            for use in uses:
                use.failed.add(why)
            return _NONE
        self._failed((left, right), level, Why.FUNCTION)
        return _NONE

    def _failed(self, tree: Any, level: _Level, why: Why) -> None:
        """Record why ``tree`` does not bound the mentions of the table whose time is in it."""
        for node in nodes(tree):
            if kind(node) == "ColumnRef":
                for use in level.find(node) or ():
                    use.failed.add(why)

    def _column(self, node: Any, level: _Level) -> _Uses:
        """Whose time column it is, bare or cast to its own type."""
        if kind(node) == "TypeCast" and not node.typeName.typmods and not node.typeName.arrayBounds:
            name = words(node.typeName.names)[-1]
            return self._column(node.arg, level) if name == self.subject.type else _NONE
        return (level.find(node) or _NONE) if kind(node) == "ColumnRef" else _NONE

    def _is_time(self, node: Any, level: _Level) -> bool:
        return bool(self._column(node, level))

    def _is_value(self, tree: Any, level: _Level) -> bool:
        """Whether its value is known when the statement begins."""
        return not self._is_volatile(tree) and not any(
            kind(node) in ("SubLink", "CurrentOfExpr")
            or (kind(node) == "ColumnRef" and not level.is_variable(node))
            for node in nodes(tree)
        )

    def _is_volatile(self, tree: Any) -> bool:
        return any(
            kind(node) == "FuncCall" and words(node.funcname)[-1] in self.subject.volatile
            for node in nodes(tree)
        )

    def _by_key(self, level: _Level, item: _Item) -> bool:
        """Whether rows of the table are looked up by its key."""
        wanted = set(self.subject.key) - {self.subject.column}
        for condition, _ in level.conditions:
            for node in _conjuncts(condition):
                if kind(node) != "A_Expr" or words(node.name)[-1] != "=":
                    continue
                for side in (node.lexpr, node.rexpr):
                    if kind(side) == "ColumnRef":
                        *prefix, column = words(side.fields) or ("",)
                        if not prefix or prefix[-1] == item.name:
                            wanted.discard(column)
        return not wanted and bool(self.subject.key)


_STATEMENTS = ("SelectStmt", "InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt")
_FROM_PARTS = ("fromClause", "usingClause", "withClause", "relation", "sourceRelation", "larg", "rarg")
_BETWEEN = ("AEXPR_BETWEEN", "AEXPR_NOT_BETWEEN", "AEXPR_BETWEEN_SYM", "AEXPR_NOT_BETWEEN_SYM")
_EXPRESSIONS = ("ColumnRef", "A_Const", "FuncCall", "A_Expr", "TypeCast")


def _union(found: Iterable[_Uses]) -> _Uses:
    return frozenset[_Use]().union(*found)


def _conjuncts(node: Any) -> Iterator[Any]:
    if kind(node) == "BoolExpr" and node.boolop.name == "AND_EXPR":
        for arm in node.args:
            yield from _conjuncts(arm)
    else:
        yield node


def _limits(node: Any) -> bool:
    return node.limitCount is not None or node.limitOffset is not None


def _closed(columns: _Columns) -> _Columns:
    """The columns, out of reach of outer conditions."""
    return [(name, _NONE) for name, _ in columns]


def _only(columns: _Columns, open_to: set[str]) -> _Columns:
    return [(name, uses if name in open_to else _NONE) for name, uses in columns]


def _side_by_side(left: _Columns, right: _Columns) -> _Columns:
    """The columns of a UNION: what bounds one bounds both."""
    if any(name is None for name, _ in (*left, *right)):
        by_name = dict(right)
        return [(name, uses | by_name.get(name, _NONE)) for name, uses in left]
    return [(name, uses | more) for (name, uses), (_, more) in zip(left, right, strict=False)]


def _renamed(columns: _Columns, names: Any) -> _Columns:
    """The columns under the names of an alias, ``t AS x (a, b)``."""
    given = words(names)
    if not given:
        return columns
    if any(name is None for name, _ in columns):
        return [(None, _NONE)]
    return [
        (given[place] if place < len(given) else name, uses) for place, (name, uses) in enumerate(columns)
    ]


def _grouped(clause: Any, columns: _Columns, level: _Level) -> set[str]:
    """The output columns that have one value per group."""
    found: set[str] = set()
    for node in clause:
        if kind(node) == "ColumnRef" and words(node.fields):
            found.add(words(node.fields)[-1])
            uses = level.find(node)
            found |= {name for name, own in columns if name and uses and own == uses}
        elif kind(node) == "A_Const" and kind(node.val) == "Integer" and 0 < node.val.ival <= len(columns):
            found.add(columns[node.val.ival - 1][0] or "")
    return found
