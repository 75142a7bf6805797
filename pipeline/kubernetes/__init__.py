"""KubeRay manifests from the typed configuration."""
