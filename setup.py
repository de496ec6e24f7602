"""What setup.cfg cannot say: the folders at the top of a checkout that an installed package has within itself.

`grass_hf.config.shipped_files` finds them in both places.
"""

from setuptools import find_packages, setup

SHIPPED = {f"grass_hf.config.shipped.{folder}": folder for folder in ("configs", "recipes")}

setup(
    packages=[*find_packages(include=["grass_hf*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"grass_hf": ["py.typed"], **{package: ["**/*.json", "**/*.yaml", "**/*.py"] for package in SHIPPED}},
)
