"""The settings of each training script, by its name: for what reads commands or checkpoints of all of them."""

from utils.config import CommonSettings
from utils.config_adv import AdversarialSettings
from utils.config_rb import EarlyBirdSettings, TicketSettings

SETTINGS_OF: dict[str, type[CommonSettings]] = {kind.script: kind for kind in (AdversarialSettings, EarlyBirdSettings, TicketSettings)}
