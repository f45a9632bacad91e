"""Image classification: cross-entropy on one label per image, scored by top-1 accuracy."""

from snella.tasks.base import Metric, TaskInfo
from snella.tasks.classification.prepare import check, prepare, sources
from snella.tasks.classification.settings import ClassificationSettings

TASK = TaskInfo(
    name="classification",
    title="Image classification",
    metrics=(Metric("top1", "Top-1 accuracy"),),
    settings=ClassificationSettings,
    prepare=prepare,
    sources=sources,
    check=check,
    implementation="snella.tasks.classification.task:Classification",
    scorer="snella.tasks.classification.score:Top1",
    toy="snella.tasks.classification.toy:toy",
    families=("vit", "swin", "convnext"),
)
