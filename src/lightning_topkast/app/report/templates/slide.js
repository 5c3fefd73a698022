"use strict";
for (const film of document.querySelectorAll(".film")) {
  const slider = film.querySelector("input");
  const said = film.querySelector("output");
  const moments = film.dataset.moments.split("|");
  slider.addEventListener("input", () => {
    film.style.setProperty("--moment", slider.value);
    said.value = slider.ariaValueText = moments[slider.value];
  });
  slider.hidden = false;
}
