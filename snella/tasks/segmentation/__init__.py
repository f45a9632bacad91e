"""Binary segmentation with SAM: one foreground class, no prompts, the mask decoder as head."""

from snella.tasks.base import Metric, TaskInfo
from snella.tasks.segmentation.prepare import check, prepare, sources
from snella.tasks.segmentation.settings import SegmentationSettings

TASK = TaskInfo(
    name="segmentation",
    title="Segmentation",
    metrics=(
        Metric("dice", "Dice"),
        Metric("iou", "IoU"),
        Metric("dice-pooled", "Dice, pooled pixels"),
        Metric("iou-pooled", "IoU, pooled pixels"),
        Metric("dice-model-size", "Dice at the model's size"),
        Metric("iou-model-size", "IoU at the model's size"),
        Metric("released-dice", "mDice (released)"),
        Metric("released-iou", "mIoU (released)"),
        Metric("boundary-f", "Boundary F"),
        Metric("s-measure", "S-measure"),
        Metric("mae", "MAE", higher_is_better=False),
    ),
    settings=SegmentationSettings,
    prepare=prepare,
    sources=sources,
    check=check,
    implementation="snella.tasks.segmentation.task:Segmentation",
    scorer="snella.tasks.segmentation.score:SegmentationScorer",
    toy="snella.tasks.segmentation.toy:toy",
    families=("sam",),
    figures={"masks": "snella.tasks.segmentation.figure:masks"},
    gallery="snella.tasks.segmentation.figure:gallery",
)
