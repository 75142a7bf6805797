"""KubeRay manifests of a deployment, generated from its typed configuration and checked."""
