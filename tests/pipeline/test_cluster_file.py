"""`ray_cluster.yaml` is a cluster-launcher file by Ray's own schema check."""

from __future__ import annotations

import pytest
import yaml

from tests.places import ROOT

PATH = ROOT / "ray_cluster.yaml"


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = fillout_defaults(yaml.safe_load(PATH.read_text()))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


def test_the_check_would_notice_a_mistake() -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = fillout_defaults(yaml.safe_load(PATH.read_text()))
    config["max_wokers"] = 3
    with pytest.raises(ValidationError):
        validate_config(config)
