"""The verb that puts a model behind an endpoint."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from motor_ray.config import Settings
from motor_ray.config_values import checked
from motor_ray.errors import ConfigError
from motor_ray.service.settings import DEFAULT_MODEL, SEPARATOR, ServiceSettings
from motor_ray.verbs.flags import Result, Unprefixed


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer requests over HTTP, and show a page for people."""

    tree: ClassVar[type[Settings]] = ServiceSettings
    """What the --config file of this verb holds."""

    model: tuple[str, ...] = ()
    """Checkpoint folder, such as STORAGE/NAME/best; of several, heatmaps are averaged. Where an endpoint is running
    already, it changes over to it."""

    host: str | None = None
    """Short for --serve.host."""

    port: int | None = None
    """Short for --serve.port."""

    new_key: str | None = None
    """Make a key for somebody of this name, put its hash into --serve.keys-file, show the key, and do nothing else."""

    stop: bool = False
    """Stop the endpoint that is running, and do nothing else."""

    write_config: str | None = None
    """Write a file for Ray's own `serve deploy`, and do nothing else."""

    config: str | None = None
    """YAML file of settings; flags win over it."""

    settings: Annotated[ServiceSettings, Unprefixed] = ServiceSettings()

    def run(self) -> Result:
        """Serve."""
        settings = self.all_settings()
        if self.new_key is not None:
            return self.make_key(settings), 0
        from motor_ray.distributed.serve_environment import set_here

        set_here(settings.serve)  # before Ray Serve is imported
        from motor_ray.distributed import endpoint
        from motor_ray.distributed.serve_file import write_serve_file

        if self.stop:
            return endpoint.stop_serving(settings.serve), 0
        if DEFAULT_MODEL not in settings.serve.models:
            raise ConfigError("give --model, the checkpoint that is to answer")
        if self.write_config:
            return write_serve_file(settings, self.write_config), 0
        return endpoint.serve_models(settings), 0

    def all_settings(self) -> ServiceSettings:
        """The settings, with what the short flags say."""
        given = {name: getattr(self, name) for name in ("host", "port") if getattr(self, name) is not None}
        if wrong := [uri for uri in self.model if SEPARATOR in uri]:
            raise ConfigError(f"--model {wrong[0]}: give several checkpoints one after the other, without commas")
        if self.model:
            given["models"] = self.settings.serve.models | {DEFAULT_MODEL: SEPARATOR.join(self.model)}
        values = self.settings.model_dump() | {"serve": self.settings.serve.model_dump() | given}
        return checked(ServiceSettings, values, "flags")

    def make_key(self, settings: ServiceSettings) -> dict[str, str]:
        """A new key, and whose it is."""
        from motor_ray.service.keys import add_key

        if not settings.serve.keys_file:
            raise ConfigError("--new-key: give --serve.keys-file, the file that the key's hash is put into")
        key = add_key(settings.serve.keys_file, str(self.new_key))
        return {"name": str(self.new_key), "key": key, "keys_file": settings.serve.keys_file}
