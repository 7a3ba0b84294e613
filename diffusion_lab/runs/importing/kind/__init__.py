"""Formats of published networks that can be imported, a class each."""

from diffusion_lab.runs.importing.kind.adm import ADMFiles
from diffusion_lab.runs.importing.kind.base import Imported, Kind
from diffusion_lab.runs.importing.kind.diffusers import DiffusersFolders
from diffusion_lab.runs.importing.kind.dit import DiTFiles, SiTFiles
from diffusion_lab.runs.importing.kind.edm import EDM2Files, EDMFiles
