"""FastPose-ViT: the pose of a spacecraft from one crop, by a vision transformer (arXiv:2512.09792).

    python -m postlude.zoo.fastpose_vit data --n 5000 --seed 0 -o speed-mini/
    python -m postlude.zoo.fastpose_vit train speed-mini/ -o pose/

`camera` and `rotation` hold the formulas, `spacecraft`, `renderer` and `making` make pictures, `data` keeps sets,
`augmentation` crops, `network`, `losses`, `training` and `metrics` are what their names say.
"""

from __future__ import annotations

__all__: list[str] = []
