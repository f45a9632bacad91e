"""Subject-driven text-to-image generation: DreamBooth on Stable Diffusion 3."""

from snella.tasks.base import Metric, TaskInfo
from snella.tasks.generation.prepare import check, prepare, sources
from snella.tasks.generation.settings import GenerationSettings

_MANY = 1e6
TASK = TaskInfo(
    name="generation",
    title="Subject-driven generation",
    metrics=(
        Metric("clip_i", "Concept alignment (CLIP-I)", "", lower=-1.0),
        Metric("vendi", "Diversity (Vendi score over a subject's images)", "", True, 1.0, _MANY),
        Metric("clip_t", "Text alignment (CLIP-T)", "", lower=-1.0),
        Metric("dino", "Subject fidelity (DINO)", "", lower=-1.0),
        Metric("lpips", "Diversity (LPIPS between samples of a prompt)", "", upper=_MANY),
        Metric("vendi_prompt", "Diversity (Vendi score, mean over prompts)", "", True, 1.0, _MANY),
        Metric("text_match", "Images closest to their own prompt (CLIP)"),
        Metric("drift", "Drift of unrelated prompts from the base model", "", False, 0.0, 2.0),
        Metric("real_clip_i", "CLIP-I between real images", "", lower=-1.0),
        Metric("real_dino", "DINO between real images", "", lower=-1.0),
        Metric("real_lpips", "LPIPS between real images", "", upper=_MANY),
        Metric("base_clip_i", "CLIP-I of the unadapted model", "", lower=-1.0),
        Metric("base_dino", "DINO of the unadapted model", "", lower=-1.0),
        Metric("base_clip_t", "CLIP-T of the unadapted model", "", lower=-1.0),
        Metric("base_vendi", "Vendi score of the unadapted model", "", True, 1.0, _MANY),
        Metric("base_lpips", "LPIPS of the unadapted model", "", upper=_MANY),
    ),
    settings=GenerationSettings,
    prepare=prepare,
    sources=sources,
    check=check,
    implementation="snella.tasks.generation.task:Generation",
    scorer="snella.tasks.generation.score:SubjectScorer",
    toy="snella.tasks.generation.toy:toy",
    families=("sd3",),
    expensive_scoring=True,
    figures={
        "samples": "snella.tasks.generation.figure:samples",
        "tradeoff_text": "snella.tasks.generation.figure:tradeoff_text",
        "tradeoff_drift": "snella.tasks.generation.figure:tradeoff_drift",
    },
    gallery="snella.tasks.generation.figure:gallery",
)
