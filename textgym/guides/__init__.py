"""Guides: whoever can start or finish an episode's text."""

from textgym.guides.base import Author, CallableGuide, Completion, Guide, GuideRequest, load_guide

__all__ = ["Author", "CallableGuide", "Completion", "Guide", "GuideRequest", "load_guide"]
