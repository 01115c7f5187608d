"""Pictures of the spacecraft with exact poses: flat faces, thin rods, one sun, numpy only.

The body is convex, so of its six faces those turned to the camera do not hide each other; rods are compared with
them by depth. Every pixel is four rays. A face reflects by Lambert's law::

    brightness = paint * (ambient + (1 - ambient) * max(0, normal . sun))

and the camera sees ``exposure * brightness`` over a background (black with stars, or the limb of a cloudy planet), with
noise of the sensor and of the photons, cut off at 255. Only a square window of the image is ever made.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from postlude.zoo.fastpose_vit.camera import Camera
from postlude.zoo.fastpose_vit.spacecraft import FACES, Spacecraft

__all__ = ["Scene", "random_scene", "render"]

Array = NDArray[np.floating]
Texture = Callable[[Array, Array], Array]

_RAYS = 2  # on each side of a pixel
_ROD_RADIUS = 0.012  # metres


@dataclasses.dataclass(frozen=True)
class Scene:
    """Light, background and camera settings of one picture.

    Attributes:
        sun: unit vector towards the sun, in the camera's frame.
        ambient: share of the light that comes from everywhere.
        exposure: factor on all brightness.
        noise: standard deviation of the sensor's noise, of 1.
        planet: brightness of the planet behind; 0 for none.
        seed: of background and noise.
    """

    sun: tuple[float, float, float]
    ambient: float = 0.15
    exposure: float = 1.0
    noise: float = 0.01
    planet: float = 0.0
    seed: int = 0


def random_scene(random: np.random.Generator) -> Scene:
    """A scene with the sun somewhere behind the camera, every second one before a planet."""
    sun = random.normal(size=3)
    sun[2] = -abs(sun[2])
    sun /= np.linalg.norm(sun)
    return Scene(
        sun=(float(sun[0]), float(sun[1]), float(sun[2])),
        ambient=float(random.uniform(0.15, 0.35)),
        exposure=float(np.exp(random.uniform(-0.2, 0.5))),
        noise=float(random.uniform(0.005, 0.025)),
        planet=float(random.uniform(0.2, 0.6)) if random.random() < 0.5 else 0.0,
        seed=int(random.integers(2**31)),
    )


def _cells(a: Array, b: Array) -> Array:
    """Solar cells: dark, with bright lines between them."""
    line = (np.abs(a * 4 - np.round(a * 4)) < 0.07) | (np.abs(b * 4 - np.round(b * 4)) < 0.07)
    return np.where(line, 0.85, np.where(a > 0.5, 0.08, 0.4))


def _disc(a: Array, b: Array) -> Array:
    """A plate with a bright disc to one side and a dark slot to the other."""
    disc = (a - 0.72) ** 2 + (b - 0.35) ** 2 < 0.035
    slot = (np.abs(a - 0.22) < 0.06) & (np.abs(b - 0.55) < 0.3)
    return np.where(disc, 1.0, np.where(slot, 0.1, 0.55))


def _plain(paint: float) -> Texture:
    return lambda a, b: np.full_like(a, paint)


def _stripe(paint: float, stripe: float, where: float) -> Texture:
    return lambda a, b: np.where(np.abs(a - where) < 0.12, stripe, paint)


# One for every face; a and b run from 0 to 1 along its first and its last edge.
_PAINTS: tuple[Texture, ...] = (
    _cells,
    _disc,
    _plain(0.35),
    _stripe(0.8, 0.2, 0.3),
    _plain(0.95),
    _stripe(0.5, 1.0, 0.75),
)


def render(
    spacecraft: Spacecraft,
    rotation: Array,
    translation: Array,
    camera: Camera,
    window: Array,
    size: int,
    scene: Scene,
) -> NDArray[np.uint8]:
    """The picture ``uint8 [size, size]`` of a square window of the image.

    Args:
        spacecraft: the body.
        rotation: ``[3, 3]``, body to camera.
        translation: ``[3]`` in metres, before the camera.
        camera: its image need not contain the whole window.
        window: ``(x1, y1, x2, y2)`` in pixels of the image.
        size: pixels of a side.
        scene: light, background, noise.
    """
    rays = size * _RAYS
    # In units of the focal length: a point of the picture is (x / z, y / z).
    steps = (np.arange(rays) + 0.5) / rays
    across = ((window[0] + steps * (window[2] - window[0])) - camera.cx) / camera.fx
    down = ((window[1] + steps * (window[3] - window[1])) - camera.cy) / camera.fy
    across, down = across.astype(np.float32), down.astype(np.float32)
    light = np.zeros((rays, rays), np.float32)
    cover = np.zeros((rays, rays), np.float32)
    depth = np.full((rays, rays), np.inf, np.float32)
    sun = np.array(scene.sun)
    corners = spacecraft.keypoints @ rotation.T + translation
    middle = corners[:8].mean(0)
    for face, paint in zip(FACES, _PAINTS, strict=True):
        _draw_face(
            corners[list(face)], middle, paint, scene, sun, across, down, light, cover, depth
        )
    for foot, tip in spacecraft.rods():
        ends = np.stack([foot, tip]) @ rotation.T + translation
        _draw_rod(ends, scene, sun, across, down, light, cover, depth)
    light, cover = _shrink(light * cover, size), _shrink(cover, size)
    random = np.random.default_rng(scene.seed)
    picture = scene.exposure * (light + (1 - cover) * _background(random, scene, size))
    noise = scene.noise * np.sqrt(0.5 + picture)
    picture += noise * random.standard_normal(picture.shape, dtype=np.float32)
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _shrink(picture: Array, size: int) -> Array:
    return picture.reshape(size, _RAYS, size, _RAYS).mean((1, 3))


def _slice(values: Array, low: float, high: float) -> slice:
    return slice(int(np.searchsorted(values, low)), int(np.searchsorted(values, high, "right")))


def _draw_face(
    corners: Array,
    middle: Array,
    paint: Texture,
    scene: Scene,
    sun: Array,
    across: Array,
    down: Array,
    light: Array,
    cover: Array,
    depth: Array,
) -> None:
    """Draw a flat face with corners ``[4, 3]`` where its rays meet it, if it is turned to the camera."""
    normal = np.cross(corners[1] - corners[0], corners[3] - corners[0])
    normal /= np.linalg.norm(normal)
    if normal @ (corners[0] - middle) < 0:
        normal = -normal
    distance = normal @ corners[0]
    if distance >= 0:
        return  # seen from behind
    flat = corners[:, :2] / corners[:, 2:]
    columns = _slice(across, flat[:, 0].min(), flat[:, 0].max())
    rows = _slice(down, flat[:, 1].min(), flat[:, 1].max())
    x, y = across[None, columns], down[rows, None]
    inside: NDArray[np.bool_] | bool = True
    area = sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(flat, np.roll(flat, -1, 0), strict=True))
    for a, b in itertools.pairwise([*flat, flat[0]]):
        side = (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])
        inside = inside & (side * np.sign(area) >= 0)
    if not np.any(inside):
        return
    far = (distance / (normal[0] * x + normal[1] * y + normal[2])).astype(np.float32)
    # Along the first and the last edge; a side face is a trapezium, and its paint runs over its edge.
    edges = np.stack([corners[1] - corners[0], corners[3] - corners[0], normal], axis=1)
    to_face = np.linalg.inv(edges)
    offset = to_face @ corners[0]
    a, b = (
        (row[0] * x + row[1] * y + row[2]) * far - start
        for row, start in zip(to_face[:2].astype(np.float32), offset[:2], strict=True)
    )
    shade = scene.ambient + (1 - scene.ambient) * max(0.0, float(normal @ sun))
    np.copyto(light[rows, columns], (paint(a, b) * shade).astype(np.float32), where=inside)
    np.copyto(cover[rows, columns], np.float32(1), where=inside)
    np.copyto(depth[rows, columns], far, where=inside)


def _draw_rod(
    ends: Array,
    scene: Scene,
    sun: Array,
    across: Array,
    down: Array,
    light: Array,
    cover: Array,
    depth: Array,
) -> None:
    """Draw a rod between ``ends [2, 3]``; one thinner than a ray covers a part of it."""
    flat = ends[:, :2] / ends[:, 2:]
    along = flat[1] - flat[0]
    length = float(along @ along)
    if length == 0:
        return
    spacing = float(across[1] - across[0])
    border = _ROD_RADIUS / ends[:, 2].min() + spacing
    columns = _slice(across, flat[:, 0].min() - border, flat[:, 0].max() + border)
    rows = _slice(down, flat[:, 1].min() - border, flat[:, 1].max() + border)
    x, y = across[None, columns] - flat[0, 0], down[rows, None] - flat[0, 1]
    share = ((x * along[0] + y * along[1]) / length).clip(0, 1)
    aside = np.hypot(x - share * along[0], y - share * along[1])
    # 1 / z is linear in the picture.
    far = 1 / (1 / ends[0, 2] + share * (1 / ends[1, 2] - 1 / ends[0, 2]))
    half = _ROD_RADIUS / far
    shown = np.maximum(half, spacing / 2)
    drawn = (aside <= shown) & (far < depth[rows, columns])
    direction = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
    across_sun = float(np.sqrt(max(0.0, 1 - float(direction @ sun) ** 2)))
    shade = scene.ambient + (1 - scene.ambient) * across_sun * np.sqrt(
        1 - (aside / shown).clip(0, 1) ** 2
    )
    part = np.minimum(1, half / shown)
    behind = light[rows, columns] * cover[rows, columns]
    covered = np.maximum(cover[rows, columns], part)
    mixed = (part * 0.9 * shade + (1 - part) * behind) / covered
    np.copyto(light[rows, columns], mixed.astype(np.float32), where=drawn)
    np.copyto(cover[rows, columns], covered.astype(np.float32), where=drawn)
    np.copyto(depth[rows, columns], far.astype(np.float32), where=drawn)


def _background(random: np.random.Generator, scene: Scene, size: int) -> Array:
    """Stars on black, or clouds below a limb, ``[size, size]``."""
    if not scene.planet:
        sky = np.zeros((size, size), np.float32)
        count = int(random.poisson(2))
        sky[random.integers(size, size=count), random.integers(size, size=count)] = random.random(
            count
        )
        return sky
    clouds = np.zeros((size, size), np.float32)
    for octave in (3, 6, 12):
        coarse = random.random((octave + 2, octave + 2), dtype=np.float32) / octave
        place = np.linspace(0, octave, size, dtype=np.float32)
        index = np.minimum(place.astype(int), octave)
        rest = place - index
        rest = rest * rest * (3 - 2 * rest)
        lines = coarse[index] * (1 - rest[:, None]) + coarse[index + 1] * rest[:, None]
        clouds += lines[:, index] * (1 - rest) + lines[:, index + 1] * rest
    angle = random.uniform(0, 2 * np.pi)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    height = np.cos(angle) * line[None] + np.sin(angle) * line[:, None] + random.uniform(-1.2, 0.6)
    return scene.planet * 2.5 * clouds * (1 / (1 + np.exp(-height / 0.03)))
