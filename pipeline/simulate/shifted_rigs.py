"""Defines four families of devices, never trained on, that refuse people from the first day.

What each does to a frame leaves the classes as far apart as before: the scores of bona fide slide below the
boundary, and a few labelled captures of a site bring them back.
"""

from __future__ import annotations

from pipeline.simulate.optics import Beam, Fringes, Glare
from pipeline.simulate.rig import SensorRig

SHIFTED = {
    "spotlight": SensorRig(  # a retrofitted NIR lamp whose narrow beam misses half of the face
        "spotlight",
        side=64,
        field=258,
        distance=580,
        depth_form="mm",
        depth_noise=1.5,
        depth_range=(300, 1100),
        white=(1.03, 1.0, 0.95),
        jpeg=88,
        ir_power=1.3,
        ir_beam=Beam(0.48, 0.1, -0.15),
    ),
    "flooded": SensorRig(  # an illuminator made for two metres, used at arm's length: skin clips
        "flooded",
        side=72,
        field=255,
        distance=520,
        depth_form="range8",
        depth_range=(300, 1000),
        depth_noise=1.6,
        ambient=0.6,
        saturation=1.1,
        ir_power=2.2,
        ir_leak=0.12,
    ),
    "pane": SensorRig(  # behind a tinted window: daylight veils colour, the lamp mirrors in the glass
        "pane",
        side=64,
        field=262,
        distance=640,
        depth_form="range16",
        depth_noise=1.8,
        depth_range=(350, 1200),
        depth_holes=0.05,
        rgb_blur=0.8,
        ir_power=1.2,
        rgb_glare=Glare(0.21, 0.82, -0.6, -0.8, 0.9, (0.85, 1.0, 0.95)),
        ir_glare=Glare(0.13, 0.63, 0.35, -0.35, 0.3),
    ),
    "wide": SensorRig(  # a dome with a wide lens and structured light: small faces, fringes in their depth
        "wide",
        side=72,
        field=412,
        distance=800,
        barrel=0.22,
        depth_form="mm",
        depth_step=8.0,
        depth_noise=1.5,
        depth_range=(300, 1600),
        depth_fringes=Fringes(5.0, 6.0, 0.3),
        ambient=0.45,
        ir_power=1.5,
    ),
}
