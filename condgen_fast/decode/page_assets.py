"""Style sheet and script of the page that `condgen_fast.decode.html` writes."""

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --card: #ffffff; --ink: #1d1f21; --soft: #62676d; --line: #dcd9d2;
  --p0: #f0935b; --p1: #f8c59b; --p2: #f3ead2; --p3: #b9dcec; --p4: #85c2e2; --gone: #b3261e; --now: #1d1f21; }
@media (prefers-color-scheme: dark) { :root { --page: #16181a; --card: #1f2224; --ink: #eceae5; --soft: #a2a7ac;
  --line: #3a3e42; --p0: #a34f1a; --p1: #7b5230; --p2: #4b483c; --p3: #2c576d; --p4: #1b6c98; --gone: #ff8a80;
  --now: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2.5rem) 4rem; max-width: 96rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
header p { max-width: 46rem; margin: .5rem 0; }
.legend { margin: 1rem 0 .5rem; display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.legend div { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .75rem; }
.legend dt { color: var(--soft); font-size: .85rem; }
.legend dd { margin: 0; display: flex; flex-wrap: wrap; gap: .3rem .5rem; align-items: baseline; }
.legend dd, .legend .token { font-size: .8rem; }
.switches { color: var(--soft); font-size: .9rem; }
.switches label { margin-right: 1.25rem; white-space: nowrap; }
.keys { display: none; white-space: nowrap; }
.js .keys { display: inline; }
kbd { border: 1px solid var(--line); border-radius: .25rem; padding: 0 .3rem; background: var(--card); font: inherit;
  font-size: .85em; }
:focus-visible { outline: 2px solid #2f80b4; outline-offset: 2px; }
.example { margin-top: 2.25rem; padding-top: 1rem; border-top: 2px solid var(--line); }
.example h2 { font-size: 1.15rem; line-height: 1.35; margin: 0 0 .25rem; overflow-wrap: anywhere; }
.example h2 span { color: var(--soft); font-weight: 400; margin-right: .25rem; }
.example > p { margin: 0 0 .5rem; color: var(--soft); overflow-wrap: anywhere; }
.example > p b { font-weight: 600; font-size: .8rem; margin-right: .35rem; }
.control { display: none; position: sticky; top: 0; z-index: 1; gap: .75rem; align-items: center; padding: .5rem 0;
  background: var(--page); }
.js .control { display: flex; }
.js .every .control { display: none; }
.control label { display: flex; flex: 1; flex-wrap: wrap; align-items: center; gap: .1rem .75rem; color: var(--soft);
  font-size: .9rem; font-variant-numeric: tabular-nums; }
.control output { color: var(--ink); font-weight: 600; }
.control input { flex: 1 1 9rem; max-width: 34rem; margin: 0; accent-color: #2f80b4; }
.control button { width: 2.25rem; height: 2.25rem; border: 1px solid var(--line); border-radius: 50%; padding: 0;
  background: var(--card); color: var(--ink); font-size: .8rem; cursor: pointer; }
.runs { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  align-items: start; }
.run { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem;
  min-width: 0; }
.run h3 { font-size: 1rem; margin: 0 0 .25rem; display: flex; justify-content: space-between; gap: 1rem;
  align-items: baseline; }
.run h3 small { color: var(--soft); font-weight: 400; white-space: nowrap; }
.detail { margin: -.2rem 0 0; color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
.run ol { list-style: none; margin: 0; padding: 0; }
.round h4 { font-size: .8rem; font-weight: 600; color: var(--soft); margin: .7rem 0 0; }
.js .example:not(.every) .round:not(.now) { display: none; }
.step { margin: .3rem 0 .55rem; }
.what { display: block; color: var(--soft); font-size: .75rem; }
.step p { margin: .1rem 0 0; line-height: 1.4; word-spacing: .06em; }
.token { display: inline-block; min-width: 1rem; padding: 0 .25rem; margin-right: 1px; border: 2px solid transparent;
  border-radius: .3rem; line-height: 1.4; font-size: .92rem; text-align: center; white-space: pre; color: var(--ink);
  vertical-align: top; margin-bottom: .35rem; }
.token sub { display: none; font-size: .62rem; line-height: 1; opacity: .8; }
.numbers .token sub { display: block; padding-bottom: .3rem; }
.numbers .step .token:is(.mask, .given) { padding-bottom: 1em; }
.edge { display: inline-block; width: 3px; height: 1.3rem; border-radius: 2px; background: var(--line);
  vertical-align: top; margin: .2rem .3rem 0; }
.edge:first-child { margin: .2rem .15rem 0 0; }
.step .edge:last-child { margin-right: -.7rem; /* takes no room: no line of it alone */ }
.legend .edge { height: 1em; }
.edge.written, .edge.committed { background: var(--now); width: 5px; }
.p0 { background: var(--p0); } .p1 { background: var(--p1); } .p2 { background: var(--p2); }
.p3 { background: var(--p3); } .p4 { background: var(--p4); }
.token.mask { min-width: 1.9rem; border: 2px dotted var(--soft); color: var(--soft);
  background: repeating-linear-gradient(-45deg, transparent 0 4px, var(--line) 4px 6px); }
.token.given { border: 2px solid var(--line); background: none; }
.token.mask:empty::after { content: "\\a0"; }
.token.mask.inserted { border: 2px solid var(--now); color: var(--ink); }
.token.mask.inserted:empty::after { content: "+"; font-weight: 700; }
.token.written { box-shadow: inset 0 -3px var(--now); }
.token.committed { box-shadow: inset 0 -3px var(--now), inset 0 3px var(--now); }
.token.inserted { border: 2px solid var(--now); }
.token.masked { border: 2px dashed var(--now); }
.token.deleted { border-color: var(--gone); text-decoration: line-through 2px var(--gone); }
.output { margin: .6rem 0 0; padding-top: .5rem; border-top: 1px solid var(--line); overflow-wrap: anywhere;
  color: var(--soft); }
.done .output { color: var(--ink); }
.js .example:not(.every) .run.done h3 small::before { content: "✓ "; }
@media (max-width: 30rem) { .run { padding: .6rem .65rem; } h1 { font-size: 1.3rem; } }
"""

SCRIPT = """
document.documentElement.classList.add("js");
const examples = [...document.querySelectorAll(".example")].map(example => {
  const slider = example.querySelector("input"), output = example.querySelector("output");
  const button = example.querySelector("button");
  const runs = [...example.querySelectorAll(".run")].map(run => ({run, rounds: [...run.querySelectorAll(".round")]}));
  let timer = null;
  const show = () => {
    output.textContent = slider.value;
    slider.ariaValueText = `round ${slider.value} of ${slider.max}`;
    for (const {run, rounds} of runs) {
      const reached = rounds.filter(round => +round.dataset.round <= +slider.value);
      for (const round of rounds) round.classList.toggle("now", round === reached.at(-1));
      run.classList.toggle("done", reached.length === rounds.length);
    }
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "▶"; button.ariaLabel = "play"; };
  const play = () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = slider.min;
    show();
    button.textContent = "❚❚"; button.ariaLabel = "pause";
    timer = setInterval(() => { slider.stepUp(); show(); if (slider.value === slider.max) stop(); }, 900);
  };
  const go = value => { stop(); slider.value = value; show(); };
  button.addEventListener("click", play);
  slider.addEventListener("input", () => go(slider.value));
  show();
  return {example, slider, play, go};
});
// Keys act on the example that is being read, unless the focused element has its own use for them.
const current = () => examples.find(({example}) => example.getBoundingClientRect().bottom > innerHeight / 3);
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input[type=range]")) return;
  const found = current();
  if (!found || all.checked) return;
  const {slider, play, go} = found;
  const actions = {ArrowLeft: () => go(+slider.value - 1), ArrowRight: () => go(+slider.value + 1)};
  if (!event.target.matches("button, input")) actions[" "] = play;
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
});
const all = document.getElementById("all"), numbers = document.getElementById("numbers");
const switches = () => {
  for (const {example} of examples) example.classList.toggle("every", all.checked);
  document.body.classList.toggle("numbers", numbers.checked);
};
all.addEventListener("change", switches);
numbers.addEventListener("change", switches);
switches();
"""
