"""The mapping files of `rdt2 data convert`: which column or topic of a foreign recording means what.

`LeRobotMapping` and `RosbagMapping` are what `--mapping FILE` is read into; `configs/data` holds an example of each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from rdt2_data.converters.columns import PoseFrame, RotationFormat, WidthUnits
from rdt2_jax.config import ConfigT, FrozenConfig, load_config
from rdt2_jax.errors import ConfigError

TASK = "task"
"""The instruction of a LeRobot mapping that stands for the task each row belongs to."""

StampSource = Literal["header", "bag"]

_COLUMN = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<start>\d+)(?::(?P<stop>\d+))?\])?")


def load_mapping(model: type[ConfigT], mapping: str | Path | None, example: str, source: Path) -> ConfigT:
    """Reads a mapping file.

    Args:
        model: `LeRobotMapping` or `RosbagMapping`.
        mapping: path, or a name inside `configs/`.
        example: name of the example in `configs/`, for the message.
        source: what is to be converted, for the message.

    Raises:
        ConfigError: no mapping was given, or as in `rdt2_jax.config.load_config`.
    """
    if mapping is None:
        raise ConfigError(
            "this source needs a mapping, which says where poses, widths and images come from",
            where=source,
            expected="--mapping FILE",
            fix=f"copy configs/{example} and put in the names of your recording",
        )
    return load_config(model, mapping)


@dataclass(frozen=True)
class ColumnRef:
    """A column, or some of its numbers.

    Attributes:
        name: of the column.
        numbers: which of each row, None for all.
    """

    name: str
    numbers: slice | None

    @classmethod
    def parse(cls, text: str) -> ColumnRef:
        """Reads "name", "name[3]" or "name[0:3]" (half-open, from 0).

        Raises:
            ValueError: for anything else.
        """
        match = _COLUMN.fullmatch(text)
        if match is None:
            raise ValueError(f"must look like name, name[3] or name[0:3], not {text!r}")
        if match["start"] is None:
            return cls(match["name"], None)
        start = int(match["start"])
        stop = start + 1 if match["stop"] is None else int(match["stop"])
        if stop <= start:
            raise ValueError(f"a range must run from a number to a later one, not {text!r}")
        return cls(match["name"], slice(start, stop))


def _column_text(text: str) -> str:
    ColumnRef.parse(text)
    return text


def _instruction(text: str) -> str:
    """A sentence, told from a misspelt keyword by its blanks or its full stop."""
    if not text.strip() or (not re.search(r"\s", text.strip()) and not text.endswith(".")):
        raise ValueError("must be a keyword that is known here, or a sentence as in 'Pick up the apple.'")
    return text


def _lerobot_instruction(text: str) -> str:
    return text if text == TASK else _instruction(text)


def _rosbag_instruction(text: str) -> str:
    return text if re.fullmatch(r"/\S+", text) else _instruction(text)


def _require_different(what: str, right: object, left: object) -> None:
    """ValueError for one source of two things; None stands for what was not recorded."""
    if right is not None and right == left:
        raise ValueError(f"{what} of right and left come from the same place, {right}: a copy that was not changed?")


Column = Annotated[str, pydantic.AfterValidator(_column_text)]
Columns = Column | tuple[Column, ...]
"""One column, or several whose numbers are put side by side."""

# ------------------------------------------------------------------------------------------------ LeRobot


class RotationColumns(FrozenConfig):
    """Where a rotation comes from, and how it is written (see `rdt2_data.converters.columns.RotationFormat`)."""

    columns: Columns
    format: RotationFormat


class WidthColumn(WidthUnits):
    """Where a gripper's width comes from; `column: null` where none was recorded."""

    column: Column | None

    @pydantic.model_validator(mode="after")
    def _unit_given(self) -> WidthColumn:
        if self.column is not None and self.unit is None:
            raise ValueError("'unit' must say policy or real_m")
        return self


class ArmColumns(FrozenConfig):
    """Where one arm's pose and width come from.

    Attributes:
        position: three numbers.
        position_unit: "m" or "mm".
        rotation, width: as their classes say.
    """

    position: Columns
    position_unit: Literal["m", "mm"] = "m"
    rotation: RotationColumns
    width: WidthColumn


class CameraColumns(FrozenConfig):
    """Names of the image or video features of the two wrists."""

    left_wrist: str
    right_wrist: str


class LeRobotMapping(PoseFrame):
    """Which columns of a LeRobot dataset mean what.

    Attributes:
        right, left: the arms.
        cameras: the wrist images.
        instruction: "task" for the task of each row, or one sentence for everything.
    """

    right: ArmColumns
    left: ArmColumns
    cameras: CameraColumns
    instruction: Annotated[str, pydantic.AfterValidator(_lerobot_instruction)] = TASK

    @pydantic.model_validator(mode="after")
    def _two_of_everything(self) -> LeRobotMapping:
        right, left = self.right, self.left
        _require_different("'position'", right.position, left.position)
        _require_different("'rotation'", right.rotation.columns, left.rotation.columns)
        _require_different("'width'", right.width.column, left.width.column)
        _require_different("'cameras'", self.cameras.right_wrist, self.cameras.left_wrist)
        return self


def column_refs(columns: str | tuple[str, ...]) -> list[ColumnRef]:
    """The columns of one mapping entry."""
    return [ColumnRef.parse(text) for text in ((columns,) if isinstance(columns, str) else columns)]


# --------------------------------------------------------------------------------------------------- bags


class PoseTopic(FrozenConfig):
    """A topic of geometry_msgs/PoseStamped, geometry_msgs/TransformStamped or nav_msgs/Odometry.

    Attributes:
        topic: its name.
        stamps: where times come from, None for the mapping's choice.
    """

    topic: str
    stamps: StampSource | None = None


class WidthTopic(WidthUnits):
    """A topic of std_msgs/Float64, std_msgs/Float32 or sensor_msgs/JointState; `topic: null` where there is none.

    Attributes:
        topic: its name.
        joint: for a JointState: whose position is meant. Messages about other joints alone are left aside.
        stamps: as in `PoseTopic`.
    """

    topic: str | None
    joint: str | None = None
    stamps: StampSource | None = None

    @pydantic.model_validator(mode="after")
    def _unit_given(self) -> WidthTopic:
        if self.topic is not None and self.unit is None:
            raise ValueError("'unit' must say policy or real_m")
        return self


class CameraTopic(FrozenConfig):
    """A topic of sensor_msgs/CompressedImage (JPEG, PNG) or sensor_msgs/Image (rgb8, bgr8, mono8)."""

    topic: str
    stamps: StampSource | None = None


class ArmTopics(FrozenConfig):
    """Where one arm's pose and width come from."""

    pose: PoseTopic
    width: WidthTopic


class CameraTopics(FrozenConfig):
    """The wrist images."""

    left_wrist: CameraTopic
    right_wrist: CameraTopic


class RosbagMapping(PoseFrame):
    """Which topics of a bag mean what.

    Attributes:
        right, left: the arms.
        cameras: the wrist images.
        instruction: a topic of std_msgs/String ("/instruction"), or one sentence for everything.
        stamps: "header" takes the stamp of a message's header, and the time of the bag for types that have none;
            "bag" always takes the time at which the message was recorded.
        typestore: message definitions for ROS 2 bags that carry none.
    """

    right: ArmTopics
    left: ArmTopics
    cameras: CameraTopics
    instruction: Annotated[str, pydantic.AfterValidator(_rosbag_instruction)]
    stamps: StampSource = "header"
    typestore: Literal["ros2_foxy", "ros2_galactic", "ros2_humble", "ros2_iron", "ros2_jazzy"] = "ros2_humble"

    @pydantic.model_validator(mode="after")
    def _two_of_everything(self) -> RosbagMapping:
        right, left = self.right, self.left
        _require_different("'pose'", right.pose.topic, left.pose.topic)
        # One JointState may carry both grippers.
        joints = [None if width.topic is None else (width.topic, width.joint) for width in (right.width, left.width)]
        _require_different("'width'", *joints)
        _require_different("'cameras'", self.cameras.right_wrist.topic, self.cameras.left_wrist.topic)
        return self
