"""Registries of the classes that a configuration selects by name, and field annotations for them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Any, Generic, Literal, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from raytrain.core.errors import RequestError
from raytrain.core.types import Spec
from raytrain.core.user_code import import_object, user_code_errors

Part = TypeVar("Part", bound=Spec)

_REGISTRIES: dict[type[Any], Registry[Any]] = {}  # by the base class of their parts


class Registry(Mapping[str, type[Part]], Generic[Part]):
    """The classes of one kind of part, by the name that selects them.

    A name is one of raytrain's own (`register`), one of an entry point in `group` of an installed
    package, or the address `module:Class` of any other class. Iteration covers the first two.
    `key` is the field of a part that holds its name.
    """

    def __init__(self, base: type[Part], key: str, *, group: str | None = None) -> None:
        self.base, self.key, self.group = base, key, group
        self._own: dict[str, type[Part]] = {}
        self._loaded: dict[str, type[Part]] = {}  # classes of other packages
        _REGISTRIES[base] = self

    def register(self, *parts: type[Part]) -> None:
        """Add classes under the default of their `key`."""
        for part in parts:
            self._own[part.model_fields[self.key].default] = part

    @property
    def own(self) -> Mapping[str, type[Part]]:
        """Raytrain's own classes."""
        return self._own

    @property
    def known(self) -> Mapping[str, type[Part]]:
        """Raytrain's own classes, and the already imported ones of other packages."""
        return {**self._own, **self._loaded}

    @functools.cached_property
    def plugins(self) -> Mapping[str, Any]:
        """The entry points of installed packages by name, not yet imported."""
        found = entry_points(group=self.group) if self.group else ()
        return {one.name: one for one in found if one.name not in self._own}

    def __getitem__(self, name: str) -> type[Part]:
        """Return the class of this name.

        Raises:
            KeyError: if there is none.
            RequestError: if it is another package's and cannot be imported, or is no such part.
        """
        known = self._own.get(name) or self._loaded.get(name)
        if known is not None:
            return known
        if name in self.plugins:
            self._loaded[name] = self._of_plugin(self.plugins[name])
        elif ":" in name and self.group:
            self._loaded[name] = self._at_address(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *self.plugins])

    def __len__(self) -> int:
        return len(self._own) + len(self.plugins)

    def importable(self) -> Mapping[str, type[Part]]:
        """All classes by name, those of other packages imported; without those that cannot be."""
        for name in self.plugins:
            with suppress(RequestError):  # reported when it is used
                self[name]
        return self.known

    def with_field(self, field: str) -> list[type[Part]]:
        """Return the classes that have this field; those of other packages only if none of raytrain's has."""
        own = [part for part in self._own.values() if field in part.model_fields]
        if own:
            return own
        self.importable()
        return [part for part in self._loaded.values() if field in part.model_fields]

    def _of_plugin(self, plugin: Any) -> type[Part]:
        with user_code_errors(plugin.name, f"cannot be imported from {plugin.value}", self.key):
            found = plugin.load()
        return self._named(plugin.name, found)

    def _at_address(self, address: str) -> type[Part]:
        return self._named(address, import_object(address, self.key, "Class")[1])

    def _named(self, name: str, found: Any) -> type[Part]:
        """Return the class, or a subclass whose default name is `name`, which records contain."""
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise RequestError(
                f"{self.key}: {name} is not a subclass of {self.base.__module__}.{self.base.__name__}"
            )
        field = found.model_fields.get(self.key)
        if field is not None and field.default == name:
            return found
        body = {
            "__module__": found.__module__,
            "__qualname__": found.__qualname__,
            "__doc__": found.__doc__,
            "__annotations__": {self.key: Literal[name]},  # pyright: ignore[reportInvalidTypeForm]
            self.key: name,
            "__reduce__": lambda part: (_restored, (self.base, name, part.model_dump())),
        }
        return type(found)(found.__name__, (found,), body)


def num_known() -> int:
    """Count the classes of all registries; it grows when one of another package is imported."""
    return sum(len(one.known) for one in _REGISTRIES.values())


def _restored(base: type[Any], name: str, values: dict[str, Any]) -> Any:
    """Rebuild a part of another package from its pickle."""
    return _REGISTRIES[base][name].model_validate(values)


class OneOf:
    """Annotation of a field that holds one part of a registry: a part, its record, or its bare name.

    A record without a name is of the `default` kind.
    """

    def __init__(self, registry: Registry[Any], default: str | None = None) -> None:
        self.registry, self.default = registry, default

    @property
    def key(self) -> str:
        """The field of the record that selects the part."""
        return self.registry.key

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        del source, handler
        return core_schema.no_info_plain_validator_function(self._validated)

    def _validated(self, value: Any) -> Any:
        if isinstance(value, self.registry.base):
            return value
        record = {self.key: value} if isinstance(value, str) else value
        if not isinstance(record, Mapping):
            raise PydanticKnownError("model_attributes_type")
        name = record.get(self.key, self.default)
        if name is None:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": f"'{self.key}'"})
        try:
            part = self.registry[str(name)]
        except RequestError as error:
            raise PydanticCustomError("part", "{said}", {"said": str(error)}) from error
        except KeyError:
            expected = ", ".join(f"'{known}'" for known in self.registry)
            context = {"discriminator": f"'{self.key}'", "tag": str(name)}
            raise PydanticKnownError(
                "union_tag_invalid", {**context, "expected_tags": expected}
            ) from None
        return part.model_validate({**record, self.key: name})
