// Brings figures to life: each still picture gives way to the same figure with its control.
// What cannot be drawn leaves the still picture where it is.
(() => {
  "use strict";
  const bring = async (figure) => {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const still = figure.querySelector(".touch-still"), live = figure.querySelector(".touch-live");
    const says = figure.querySelector(".touch-says"), { values, said } = spec.usermeta;
    const { view } = await window.vegaEmbed(live, spec, { mode: "vega-lite", renderer: "svg", actions: false });
    live.hidden = false;
    still.hidden = true;
    // the sentence stands in the drawing; here it is for the ear: the value of the slider, and after each move
    const slider = live.querySelector(".vega-bind input");
    const tell = (value) => { slider.setAttribute("aria-valuetext", said[values.indexOf(value)]); };
    tell(view.signal("chosen"));
    view.addSignalListener("chosen", (_, value) => { tell(value); says.textContent = said[values.indexOf(value)]; });
  };
  for (const figure of document.querySelectorAll("figure.touch")) bring(figure).catch((error) => console.warn(error));
})();
