"""The tab Explore: what lies between two things, what guidance does, how noise becomes an image,
and which training images are nearest. `jobs.explore` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from latentdiff.editing import FRAMES
from latentdiff.evaluation.gallery import SCALES
from latentdiff.web.edit import SHOWN, class_choices, enlarged
from latentdiff.web.fields import Dropdown, Number, Slider
from latentdiff.web.jobs.explore import SAMPLER, Asked, Explored, find, follow, guide, interpolate
from latentdiff.web.jobs.uploads import Upload
from latentdiff.web.parts import code_fields, facts_of_model, let_stop, updates_of
from latentdiff.web.uploads import undecoded
from latentdiff.web.work import QUEUE

if TYPE_CHECKING:
    from latentdiff.web.context import Context
    from latentdiff.web.facts import Facts

STEPS = 30  # of a trajectory and of guidance at several scales, as the page asks for them at first


def build(context: Context) -> None:
    """Fill the tab."""
    models, limits = context.models, context.limits
    if not models.names:
        gr.Markdown("There is no model to explore. Give one: `latentdiff serve MODEL`.")
        return
    # What is asked for, and what is shown
    facts = models.facts(models.names[0])
    upload: dict[str, Any] = {"type": "filepath", "sources": ["upload", "clipboard"], "height": 200}
    with gr.Row():
        model = Dropdown(models.names, value=facts.name, label="Model", filterable=False, visible=len(models.names) > 1)
        one_class = Dropdown(label="Class", **_class_field(facts))
        one_prompt = gr.Textbox("", label="Prompt", **_prompt_field(facts))
        seed = Number(0, label="Seed", precision=0)
        steps = Number(min(STEPS, limits.steps), label="Steps", precision=0, minimum=1)
        sampler = Dropdown(label="Sampler", **_sampler_field(facts))
    with gr.Accordion("From one to another", open=True):
        with gr.Row():
            other_class = Dropdown(label="To the class", **_class_field(facts, 1))
            other_prompt = gr.Textbox("", label="To the prompt", **_prompt_field(facts))
            frames = Number(min(FRAMES, limits.images), label="Images of the way", precision=0, minimum=2)
        with gr.Accordion("Between two pictures", open=False):
            gr.Markdown("What they show is the class or prompt of each end. Leave it out if you do not know it.")
            with gr.Row():
                first = undecoded(gr.Image(label="First picture", **upload))
                last = undecoded(gr.Image(label="Last picture", **upload))
        way = Results("interpolate", "Go from one to another", "Place on the way")
    with gr.Accordion("What guidance does", open=False):
        with gr.Row():
            scales = gr.Textbox(" ".join(f"{scale:g}" for scale in SCALES), label="Scales of guidance", info="1 is off")
            count = Number(min(3, limits.images), label="Images of each scale", precision=0, minimum=1)
        swept = Results("guidance", "Draw at each scale")
    with gr.Accordion("From noise to an image", open=False):
        guidance = gr.Textbox("", label="Guidance", placeholder="the model's default", max_lines=1)
        path = Results("trajectory", "Draw step by step", "Step")
    with gr.Accordion("Nearest training images", open=False, visible=context.data is not None):
        gr.Markdown(
            "Of an uploaded picture, or else of an image of the class or prompt above. Distances are root mean square "
            "differences of pixels from 0 to 1."
        )
        picture = undecoded(gr.Image(label="Picture", **upload))
        near = Results("nearest", "Find the nearest")

    # Another model has other fields
    def choose(name: str) -> list[Any]:
        """The fields for another model."""
        facts = facts_of_model(context, name)
        classes = [gr.update(**_class_field(facts, number)) for number in (0, 1)]
        prompt = gr.update(**_prompt_field(facts))
        return [classes[0], prompt, gr.update(**_sampler_field(facts)), classes[1], prompt]

    fields = [one_class, one_prompt, sampler, other_class, other_prompt]
    model.change(choose, model, fields, api_visibility="private", **QUEUE)

    # The requests of the four parts
    def run(results: Results, visitor: str | None, work: Callable[..., Explored]) -> Iterator[Any]:
        """Run a request, and show its results."""
        try:
            for update in updates_of(context, visitor, partial(work, limits=limits)):
                yield {results.status: update.text} if update.result is None else results.shown(update.result)
        except gr.Error as error:  # the line stays where the visitor looks, also when the message is closed
            yield {results.status: error.message, results.made: gr.update(visible=False)}
            raise

    def go(
        model: str,
        from_class: str,
        from_prompt: str,
        to_class: str,
        to_prompt: str,
        first: Upload | None = None,
        last: Upload | None = None,
        frames: float | None = None,
        seed: float | None = None,
        steps: float | None = None,
        request: gr.Request = None,
    ) -> Iterator[Any]:
        """Go from one class, prompt or picture to another."""
        asked = Asked(model, from_class, from_prompt, seed, steps)
        what: dict[str, Any] = {"to_class": to_class, "to_prompt": to_prompt, "pictures": (first, last), "frames": frames}
        yield from run(way, request.session_hash, partial(interpolate, asked=asked, **what))

    def draw_at_scales(
        model: str,
        of_class: str,
        prompt: str,
        scales: str,
        count: float,
        seed: float,
        steps: float,
        sampler: str,
        request: gr.Request,
    ) -> Iterator[Any]:
        """Draw a class or prompt at several scales of guidance."""
        asked = Asked(model, of_class, prompt, seed, steps, sampler)
        yield from run(swept, request.session_hash, partial(guide, asked=asked, scales=scales, count=count))

    def draw_step_by_step(
        model: str,
        of_class: str,
        prompt: str,
        guidance: str,
        seed: float,
        steps: float,
        sampler: str,
        request: gr.Request,
    ) -> Iterator[Any]:
        """Show the estimate of the final image after each step, from noise to an image."""
        asked = Asked(model, of_class, prompt, seed, steps, sampler)
        yield from run(path, request.session_hash, partial(follow, asked=asked, guidance=guidance))

    def find_nearest(
        model: str,
        of_class: str,
        prompt: str,
        picture: Upload | None = None,
        seed: float | None = None,
        steps: float | None = None,
        sampler: str | None = None,
        request: gr.Request = None,
    ) -> Iterator[Any]:
        """Find the training images that are nearest to a picture, or to an image of a class or prompt."""
        asked = Asked(model, of_class, prompt, seed, steps, sampler)
        yield from run(near, request.session_hash, partial(find, asked=asked, data=context.data, picture=picture))

    # The buttons
    named_by = [one_class, one_prompt]
    drawn_by = [seed, steps, sampler]
    ends = [*named_by, other_class, other_prompt, first, last]
    way.wire(context, go, [model, *ends, frames, seed, steps])
    swept.wire(context, draw_at_scales, [model, *named_by, scales, count, *drawn_by])
    path.wire(context, draw_step_by_step, [model, *named_by, guidance, *drawn_by])
    near.wire(context, find_nearest, [model, *named_by, picture, *drawn_by])


class Results:
    """The buttons of a part of the tab, and what it shows.

    Args:
        name: of the request, in the API and in the page's elements.
        button: what the button says.
        scrubber: the label of a slider that chooses one of the images; "" for none.
    """

    def __init__(self, name: str, button: str, scrubber: str = ""):
        self.name = name
        with gr.Row():
            self.start = gr.Button(button, variant="primary")
            self.stop = gr.Button("Stop")
        self.status = gr.Markdown(elem_id=f"explore-{name}")
        self.scrubber = Slider(1, 2, 1, step=1, label=scrubber, visible=False) if scrubber else None
        # What is shown and hidden is a column, so that the values are plain ones for a program too
        with gr.Column(visible=False) as self.made:
            self.gallery = gr.Gallery(
                label="Images",
                type="filepath",
                format="png",
                columns=4,
                height=SHOWN if scrubber else "auto",
                object_fit="contain",
                interactive=False,
                preview=bool(scrubber),
                elem_classes=["whole", "rows"],
                show_label=False,
                buttons=["download", "fullscreen"],
            )
            with gr.Column(elem_classes="when-full"):
                self.file = gr.File(label="File", interactive=False, elem_id=f"explore-{name}-file")
            self.command, self.code = code_fields("file", elem_classes="when-full")

    @property
    def components(self) -> list[Any]:
        """What a request changes."""
        return [self.status, self.gallery, self.file, self.command, self.code, self.made]

    def wire(self, context: Context, function: Callable[..., Iterator[Any]], inputs: list[Any]) -> None:
        """Run function(*inputs, request) where the button is pressed, and stop it at the other one."""
        shown = {"show_progress": "minimal", "show_progress_on": self.status}
        event = self.start.click(function, inputs, self.components, api_name=self.name, **shown, **QUEUE)
        let_stop(context, self.stop, self.status, event)
        own: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        if self.scrubber is None:
            event.success(self.columns, self.gallery, self.gallery, **own)
        else:
            event.success(self.last, self.gallery, [self.gallery, self.scrubber], **own)
            self.scrubber.input(
                lambda place: gr.update(selected_index=int(place) - 1),
                self.scrubber,
                self.gallery,
                **own,
            )

    def columns(self, images: list[Any] | None) -> Any:
        """A column for each caption."""
        captions = [caption for _, caption in images or []]
        return gr.update(columns=min(8, len(dict.fromkeys(captions)) or 1))

    def last(self, images: list[Any] | None) -> list[Any]:
        """The last image chosen, and the slider as long as there are images."""
        count = len(images or [])
        return [
            gr.update(selected_index=count - 1 if count else None),
            gr.update(maximum=max(2, count), value=max(1, count), visible=count > 1),
        ]

    def shown(self, result: Explored) -> dict[Any, Any]:
        """The values of the components for a result."""
        images = [(enlarged(image), caption) for image, caption in zip(result.images, result.captions, strict=True)]
        return {
            self.status: "Done.",
            self.gallery: images,
            self.file: None if result.file is None else str(result.file),
            self.command: result.command,
            self.code: result.code,
            self.made: gr.update(visible=True),
        }


def _class_field(facts: Facts, number: int = 0) -> dict[str, Any]:
    chosen = facts.class_names[number : number + 1]
    is_asked = bool(facts.class_names) and not facts.reads_text
    return class_choices(facts) | {"value": chosen[0] if chosen else "", "visible": is_asked}


def _prompt_field(facts: Facts) -> dict[str, Any]:
    return {"visible": facts.reads_text}


def _sampler_field(facts: Facts) -> dict[str, Any]:
    return {"choices": list(facts.samplers), "value": SAMPLER, "visible": not facts.over_codes}
