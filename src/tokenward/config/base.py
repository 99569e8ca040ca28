"""What the tables of a recipe are made of: strict tables, named objects, bounded numbers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator
from pydantic.fields import FieldInfo

_STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")


class Named(BaseModel):
    """An object chosen by name, and its arguments, which the object itself checks.

    In a recipe it is flat: ``{name: sepo, beta: 2.0}``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    arguments: dict[str, Any] = {}

    @model_serializer
    def flat(self) -> dict[str, Any]:
        """The table as it is written in a recipe."""
        return {"name": self.name, **self.arguments}


class Table(BaseModel):
    """One table of a recipe: frozen, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: _or_default(cls.model_fields.get(key), value) for key, value in values.items()}


def _or_default(field: FieldInfo | None, value: Any) -> Any:
    default = None if field is None else field.get_default(call_default_factory=True)
    if value is None and isinstance(default, Table | Named | dict):
        return default  # `oracle:` with nothing below it, as after commenting everything out
    if isinstance(default, Named) and isinstance(value, dict) and "name" not in value:
        return {"name": default.name, **value}
    return value


def _named(value: Any) -> Any:
    if isinstance(value, Named):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a named table needs a name")
    return Named(name=value["name"], arguments={k: v for k, v in value.items() if k != "name"})


def training_table(value: Any) -> Any:
    """A ``training`` table with its words as they were meant."""
    if not isinstance(value, dict):
        return value
    # YAML reads the bare word `no`, which is the name of a strategy, as false.
    return {k: "no" if k in _STRATEGIES and v is False else v for k, v in value.items()}


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
NamedTable = Annotated[Named, BeforeValidator(_named)]
Training = Annotated[dict[str, Any], BeforeValidator(training_table)]

TRAINING = Field(default={}, description="Fields of transformers.TrainingArguments, as they are.")
