"""Building blocks of a recipe's tables: strict settings, named objects and bounded numbers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator
from pydantic.fields import FieldInfo

_STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")


class Named(BaseModel):
    """An object chosen by name, with its arguments. The object itself checks them.

    A recipe writes it flat: ``{name: sepo, beta: 2.0}``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    arguments: dict[str, Any] = {}

    @model_serializer
    def flat(self) -> dict[str, Any]:
        """The table as a recipe writes it."""
        return {"name": self.name, **self.arguments}


class Settings(BaseModel):
    """Base class of the tables of a recipe: frozen, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: _or_default(cls.model_fields.get(key), value) for key, value in values.items()}


def _or_default(field: FieldInfo | None, value: Any) -> Any:
    default = None if field is None else field.get_default(call_default_factory=True)
    if value is None and isinstance(default, Settings | Named | dict):
        return default  # `oracle:` with every line below it commented out
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
    """A ``training`` table whose strategies read ``no`` as the word: YAML takes it for false."""
    if not isinstance(value, dict):
        return value
    return {k: "no" if k in _STRATEGIES and v is False else v for k, v in value.items()}


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
NamedTable = Annotated[Named, BeforeValidator(_named)]
Training = Annotated[dict[str, Any], BeforeValidator(training_table)]


def key(description: str, default: Any = ...) -> Any:
    """A key of a table; without a default it is required."""
    return Field(default=default, description=description)


TRAINING = key("Fields of transformers.TrainingArguments.", {})
