"""What `fastllm.quantize` is asked for."""

from dataclasses import dataclass, replace

from fastllm.quant.formats import Format, parse
from fastllm.quant.linear import ACTIVATIONS, ROUNDED

METHODS = ("round", "hqq", "gptq", "awq")
CALIBRATED = ("gptq", "awq")
MIN_WEIGHTS = 1 << 17
"""Where codes begin to win over float32, measured: below, a call costs as much as it saves. The
device and the dtype do not count, so that a state_dict fits wherever the same model is quantized.
"""


@dataclass(frozen=True)
class Config:
    """How the linear layers of a model are quantized.

    weights      a format, by name or as a Format
    activations  "float": weights only; "int8": every token is quantized as it arrives;
                 "int8_static": with one scale a layer, from calibration; int8 and int4
    method       how codes are found. "round": to the nearest. "hqq": no data, half-quadratic
                 (Badri and Shaji 2023), for asymmetric int4. "gptq" (Frantar et al. 2022) and
                 "awq" (Lin et al. 2023): by calibration
    smooth       SmoothQuant's alpha in (0, 1) (Xiao et al. 2022): channels of the activations with
                 large values are scaled down and their weights up, by calibration; 0.5 is usual
    outliers     LLM.int8's threshold (Dettmers et al. 2022; 6.0 there): inputs that exceed it in
                 calibration stay in float, with their columns of the weight
    outlier_threshold  the same, found anew in each call and without calibration: the inputs in
                 which a value exceeds it are multiplied in float, the others in int8. What
                 "smooth" and "awq" do to the inputs comes first
    head         the output layer of a language model, too. It is left in float otherwise, as
                 other libraries do: it is the most sensitive one, and often tied to the embedding
    act_order    "gptq" goes through the columns by the size of their inputs, the largest first
    min_weights  layers with fewer weights stay in float, where they are faster; 0: none does.
                 None: MIN_WEIGHTS

    Raises ValueError or TypeError that names the field.
    """

    weights: str | Format = "int8"
    activations: str = "float"
    method: str = "round"
    smooth: float | None = None
    outliers: float | None = None
    outlier_threshold: float | None = None
    head: bool = False
    act_order: bool = False
    min_weights: int | None = None

    def __post_init__(self) -> None:
        form = self.format
        if self.activations not in ACTIVATIONS:
            names = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activations: expected one of {names}, found {self.activations!r}")
        if self.activations != "float" and form.kind not in ROUNDED:
            raise ValueError(
                f"activations: expected 'float' for {form} weights, found {self.activations!r}"
            )
        if self.method not in METHODS:
            names = ", ".join(map(repr, METHODS))
            raise ValueError(f"method: expected one of {names}, found {self.method!r}")
        if self.method == "hqq" and form.symmetric:
            raise ValueError(
                f"method: 'hqq' expects asymmetric weights (int4_asym_g64), found {form}"
            )
        if self.method == "gptq" and (form.double or form.group < -1):
            raise ValueError(f"method: 'gptq' expects scales by rows or groups, found {form}")
        if self.act_order and self.method != "gptq":
            raise ValueError(f"act_order: expected with method 'gptq' only, found {self.method!r}")
        if self.min_weights is not None and (
            type(self.min_weights) is not int or self.min_weights < 0
        ):
            raise ValueError(f"min_weights: expected 0 or more, found {self.min_weights!r}")
        for name in ("head", "act_order"):
            if type(value := getattr(self, name)) is not bool:
                raise TypeError(f"{name}: expected True or False, found {value!r}")
        for name in ("smooth", "outliers"):
            value = getattr(self, name)
            if value is not None and type(value) not in (int, float):
                raise TypeError(f"{name}: expected a number or None, found {value!r}")
        if self.smooth is not None and not 0 < self.smooth < 1:
            raise ValueError(f"smooth: expected a number between 0 and 1, found {self.smooth!r}")
        if self.smooth is not None and self.method == "awq":
            raise ValueError("smooth: 'awq' finds its own scales, found both")
        if self.outliers is not None:
            if not self.outliers > 0:
                raise ValueError(f"outliers: expected a positive number, found {self.outliers!r}")
            if self.activations == "float" or self.smooth is not None or self.method != "round":
                raise ValueError(
                    "outliers: expected rounded activations, method 'round' and no smoothing, "
                    f"found {self}"
                )

        if self.outlier_threshold is not None:
            self._check_threshold(self.outlier_threshold)

    def _check_threshold(self, value: float) -> None:
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ValueError(f"outlier_threshold: expected a positive number, found {value!r}")
        if self.activations == "float":
            raise ValueError("outlier_threshold: expected rounded activations, found 'float'")
        if self.outliers is not None:
            raise ValueError("outlier_threshold: expected it without outliers, found both")

    @property
    def format(self) -> Format:
        """The weights' format."""
        return parse(self.weights)

    @property
    def smallest(self) -> int:
        """The fewest weights of a layer that is quantized."""
        return MIN_WEIGHTS if self.min_weights is None else self.min_weights

    @property
    def needs_data(self) -> bool:
        """Whether it cannot do without calibration."""
        static = self.activations == "int8_static"
        learned = self.smooth is not None or self.outliers is not None
        return static or learned or self.method in CALIBRATED

    def __str__(self) -> str:
        parts = [str(self.format)]
        if self.activations != "float":
            parts.append(f"{self.activations} activations")
        if self.method != "round":
            parts.append(self.method + ", act order" * self.act_order)
        if self.smooth is not None:
            parts.append(f"smooth {self.smooth:g}")
        if self.outliers is not None:
            parts.append(f"outliers above {self.outliers:g}")
        if self.outlier_threshold is not None:
            parts.append(f"columns above {self.outlier_threshold:g} in float")
        return ", ".join(parts)


NAMED = {
    "int8": Config("int8", "int8"),
    "int8_weight": Config("int8"),
    "int8_static": Config("int8", "int8_static"),
}


def as_config(wish: "str | Format | Config", min_weights: int | None = None) -> Config:
    """A name ("int8": activations, too; "int8_weight"; or a format's), a Format, or a Config.

    min_weights: the Config's, unless None.
    """
    if min_weights is not None:
        return replace(as_config(wish), min_weights=min_weights)
    if isinstance(wish, Config):
        return wish
    if isinstance(wish, str) and wish in NAMED:
        return NAMED[wish]
    if isinstance(wish, str | Format):
        try:
            return Config(wish)
        except ValueError as error:
            known = ", ".join(map(repr, NAMED))
            raise ValueError(f"config: expected {known}, a Config, or a format; {error}") from None
    raise TypeError(f"config: expected a name, a Format or a Config, found {type(wish).__name__}")
