"""JSON references: the subschema that a `$ref` names.

Pipeline: JSON schema -> [structured.json_references] -> json_shapes. Host only.

Source: JSON Schema 2020-12, sections 8.2 and 9; drafts 4 to 7 for `id` and `$ref` with
siblings. https://json-schema.org/draft/2020-12/json-schema-core
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

# Keywords whose value has subschemas; an `$id` elsewhere is not an identifier.
_MAPS = frozenset(
    "properties patternProperties $defs definitions dependentSchemas "
    "dependencies".split()
)
_SINGLE_OR_LIST = frozenset(
    "allOf anyOf oneOf not if then else prefixItems items additionalItems contains "
    "unevaluatedItems additionalProperties propertyNames unevaluatedProperties "
    "contentSchema".split()
)
_UNEVALUATED = ("unevaluatedItems", "unevaluatedProperties")
Scope = tuple[str, ...]  # URIs of the schemas that references went through


@dataclasses.dataclass(frozen=True, eq=False)
class Subschema:
    """A part of a document, with the URI against which its references are resolved."""

    schema: Any
    base: str


class Document:
    """A schema with an index of its resources and anchors.

    Args:
        root: the parsed schema.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        dialect = root.get("$schema", "") if isinstance(root, Mapping) else ""
        dialect = dialect if isinstance(dialect, str) else ""
        is_draft = [f"draft-0{n}" in dialect for n in (3, 4, 5, 6, 7)]
        self.ignores_siblings = any(is_draft)  # of $ref
        self.contains_evaluates = "2019-09" not in dialect
        self.has_unevaluated = False
        self._id_name = "id" if any(is_draft[:3]) else "$id"
        self._resources = {"": Subschema(root, self.base_of(root, ""))}
        self._anchors: dict[tuple[str, str], Subschema] = {}
        self._dynamic: dict[tuple[str, str], Subschema] = {}
        for part in self._parts():
            self._add(part)
        self._dynamic_urls = {url for url, _ in self._dynamic}

    def base_of(self, schema: Any, base: str) -> str:
        """Return the base URI within `schema`, which lies in a part with URI `base`."""
        found = schema.get(self._id_name) if isinstance(schema, Mapping) else None
        if not isinstance(found, str) or found.startswith("#"):
            return base
        if self.ignores_siblings and "$ref" in schema:
            return base
        return urldefrag(urljoin(base, found)).url

    def resolve(self, ref: Any, base: str) -> Subschema | None:
        """Return what `ref` names in a part with URI `base`, or None."""
        if not isinstance(ref, str):
            return None
        full = base + ref if ref.startswith("#") else urljoin(base, ref)
        url, fragment = urldefrag(full)
        resource = self._resources.get(url)
        if resource is None:
            return None
        fragment = unquote(fragment)
        if not fragment:
            return resource
        if not fragment.startswith("/"):
            return self._anchors.get((url, fragment))
        steps = [
            s.replace("~1", "/").replace("~0", "~") for s in fragment.split("/")[1:]
        ]
        return functools.reduce(self._child, steps, resource)

    def resolve_dynamic(self, ref: Any, base: str, scope: Scope) -> Subschema | None:
        """Return what a `$dynamicRef` or `$recursiveRef` names, or None.

        If it names a dynamic anchor, the outermost schema in `scope` with an equal one
        has the target.
        """
        found = self.resolve(ref, base)
        if found is None:
            return None
        name = urldefrag(ref).fragment
        if self._dynamic.get((found.base, name)) is not found:
            return found
        outer = (self._dynamic.get((url, name)) for url in scope)
        return next((one for one in outer if one is not None), found)

    def entered(self, scope: Scope, base: str) -> Scope:
        """Return the scope within the schema with URI `base`."""
        is_new = base in self._dynamic_urls and base not in scope
        return (*scope, base) if is_new else scope

    def _child(self, part: Subschema | None, step: str) -> Subschema | None:
        if part is None:
            return None
        if (
            isinstance(part.schema, list)
            and step.isdigit()
            and int(step) < len(part.schema)
        ):
            found = part.schema[int(step)]
        elif isinstance(part.schema, Mapping) and step in part.schema:
            found = part.schema[step]
        else:
            return None
        return Subschema(found, self.base_of(found, part.base))

    def _parts(self) -> Iterator[Subschema]:
        """Yield all subschemas, without recursion: a schema can be very deep."""
        todo = [self._resources[""]]
        while todo:
            part = todo.pop()
            schema = part.schema
            if not isinstance(schema, Mapping):
                continue
            yield part
            children: list[Any] = []
            for name, value in schema.items():
                if name in _MAPS and isinstance(value, Mapping):
                    children += value.values()
                elif name in _SINGLE_OR_LIST:
                    children += value if isinstance(value, list) else [value]
            todo += [
                Subschema(child, self.base_of(child, part.base)) for child in children
            ]

    def _add(self, part: Subschema) -> None:
        resource = self._resources.setdefault(part.base, part)
        self.has_unevaluated |= any(name in part.schema for name in _UNEVALUATED)
        names = [part.schema.get("$anchor"), part.schema.get("$dynamicAnchor")]
        own_id = part.schema.get(self._id_name)
        if isinstance(own_id, str) and "#" in own_id:
            names.append(own_id.partition("#")[2])
        for name in names:
            if isinstance(name, str) and name:
                self._anchors.setdefault((part.base, name), part)
        dynamic = part.schema.get("$dynamicAnchor")
        if isinstance(dynamic, str) and dynamic:
            key = (part.base, dynamic)
            self._dynamic.setdefault(key, self._anchors[key])
        if part.schema.get("$recursiveAnchor") is True and resource is part:
            self._dynamic.setdefault((part.base, ""), part)
