// SPDX-License-Identifier: Apache-2.0
// The page "Does my model fit?": looks up what the planner wrote, adds up, and draws.
"use strict";

const galoreFit = (() => {
  const TERMS = [
    ["weights", "#5b6577"],
    ["projectors", "#8c2d04"],
    ["first moments", "#d94801"],
    ["second moments", "#fd8d3c"],
    ["scales, counters", "#fdbe85"],
    ["gradients", "#08519c"],
    ["activations", "#4292c6"],
    ["workspace", "#9ecae1"],
  ];
  const WAYS = {
    plain: "",
    remat: "rematerialised",
    layerwise: "a layer at a time",
    never: "gradients never formed",
  };
  const START = {
    model: "7b", card: "rtx4090", share: "0.95", method: "galore_adamw8bit",
    rank: "1024", way: "layerwise", work: "1x2048", dtype: "bfloat16",
  };
  const FIELDS = Object.keys(START);
  const models = {};
  const here = document.currentScript.src;
  const form = document.getElementById("fit");
  const at = (id) => document.getElementById(id);
  let known = null;

  const gb = (bytes) => (bytes / 1e9).toFixed(2) + " GB";
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const isGalore = (method) => method.startsWith("galore_");

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) {
      made.setAttribute(name, value);
    }
    return made;
  }

  function fill(name, values, shown = (x) => x) {
    const options = values.map((x) => element("option", shown(x), { value: x }));
    form.elements[name].replaceChildren(...options);
  }

  function choose(name, value) {
    const field = form.elements[name];
    const values = [...field.options].map((option) => option.value);
    if (values.includes(value)) field.value = value;
    return values.includes(value);
  }

  const chosen = () =>
    Object.fromEntries(FIELDS.map((name) => [name, form.elements[name].value]));

  // Calls `then` with the tables of a model, loaded once.
  function withModel(name, then) {
    if (models[name]) return then(models[name]);
    const script = element("script", "", { src: new URL(`fit/${name}.js`, here) });
    script.onload = () => then(models[name]);
    script.onerror = () => say(`The tables of ${name} are missing: run make docs.`);
    document.head.append(script);
  }

  function say(text, fits) {
    const place = at("fit-answer");
    place.textContent = text;
    place.dataset.fits = fits === undefined ? "" : String(fits);
  }

  function ranksOf(tables, method) {
    const keys = Object.keys(tables.plans).map((key) => key.split("/"));
    const found = keys.filter((key) => key[0] === method).map((key) => Number(key[1]));
    return [...new Set(found)].sort((a, b) => a - b);
  }

  // Bytes by term, in the order of TERMS; nothing where it was not planned.
  function bytes(tables, { method, rank, dtype, way, work }) {
    const used = isGalore(method) ? rank : 0;
    const plan = tables.plans[`${method}/${used}/${dtype}/${way}`];
    const place = known.workloads.findIndex(([n, t]) => `${n}x${t}` === work);
    return plan && [...plan.held, ...plan.peaks[place]];
  }

  const isTpu = (card) => card.startsWith("v");
  const budget = ({ card, share }) =>
    known.cards[card] * (isTpu(card) ? 1 : Number(share));

  // What a program has to be told, so that JAX takes this share of a card.
  const advice = ({ card, share }) =>
    isTpu(card) || share === "0.75"
      ? ""
      : ` Start the program with XLA_PYTHON_CLIENT_MEM_FRACTION=${share}.`;

  function bar(numbers, have) {
    const whole = Math.max(sum(numbers), have) * 1.02;
    const label = TERMS.map(([name], i) => `${name} ${gb(numbers[i])}`).join(", ");
    const line = element("div", "", { class: "fit-bar", role: "img", "aria-label": label });
    TERMS.forEach(([, colour], i) => {
      const width = `width:${(100 * numbers[i]) / whole}%;background:${colour}`;
      line.append(element("span", "", { style: width }));
    });
    const place = `left:${(100 * have) / whole}%`;
    line.append(element("i", "", { style: place, title: gb(have) }));
    return line;
  }

  function legend(numbers) {
    const list = element("ul", "", { class: "fit-legend" });
    TERMS.forEach(([name, colour], i) => {
      if (!numbers[i]) return;
      const item = element("li", ` ${name} ${gb(numbers[i])}`);
      item.prepend(element("span", "", { style: `background:${colour}` }));
      list.append(item);
    });
    return list;
  }

  function show(tables, now) {
    const numbers = bytes(tables, now);
    const have = budget(now);
    at("fit-bar").replaceChildren();
    if (!numbers) {
      return say(`${now.method} has gradients: choose another way to run a step.`, false);
    }
    const total = sum(numbers);
    const left = gb(Math.abs(have - total));
    const holds = `A step holds ${gb(total)}; JAX has ${gb(have)} of this card. `;
    const fits = total <= have;
    const ends = fits ? `It fits, ${left} are left.` : `It does not fit: ${left} too much.`;
    say(holds + ends + advice(now), fits);
    at("fit-bar").replaceChildren(bar(numbers, have), legend(numbers));
  }

  // The first way that fits, of one optimizer at one rank.
  function best(tables, now, have) {
    for (const way of known.ways) {
      const numbers = bytes(tables, { ...now, way });
      if (numbers && sum(numbers) <= have) return { ...now, way, total: sum(numbers) };
    }
    return null;
  }

  function list(tables, now) {
    const have = budget(now);
    const found = known.methods.flatMap((method) =>
      ranksOf(tables, method)
        .reverse()
        .map((rank) => best(tables, { ...now, method, rank: String(rank) }, have))
        .filter(Boolean)
    );
    if (!found.length) {
      const text = "Nothing of it fits: take a larger card, fewer tokens or a smaller model.";
      return at("fit-list").replaceChildren(element("p", text));
    }
    const table = element("table", "", { class: "docutils" });
    const head = element("tr", "");
    for (const x of ["optimizer", "rank", "a step is run", "bytes"]) {
      head.append(element("th", x, { scope: "col" }));
    }
    table.append(element("thead", ""), element("tbody", ""));
    table.tHead.append(head);
    found.forEach((row) => table.tBodies[0].append(line(row)));
    const wrapper = element("div", "", { class: "table-wrapper docutils" });
    wrapper.append(table);
    at("fit-list").replaceChildren(wrapper);
  }

  function line(row) {
    const made = element("tr", "");
    const name = element("td", "");
    name.append(element("a", row.method, { href: address(row) }));
    const rank = isGalore(row.method) ? row.rank : "";
    made.append(name, ...[rank, WAYS[row.way], gb(row.total)].map((x) => element("td", x)));
    return made;
  }

  const address = (now) =>
    "?" + new URLSearchParams(FIELDS.map((name) => [name, now[name]])).toString();

  // Ranks are those of the model; the nearest to the former one is chosen.
  function offerRanks(tables, wanted) {
    const ranks = ranksOf(tables, known.methods.find(isGalore));
    const near = [...ranks].sort((a, b) => Math.abs(a - wanted) - Math.abs(b - wanted));
    fill("rank", ranks);
    choose("rank", String(near[0]));
    form.elements.rank.disabled = !isGalore(form.elements.method.value);
  }

  function refresh(wanted = Number(form.elements.rank.value)) {
    withModel(form.elements.model.value, (tables) => {
      if (tables.name !== form.elements.model.value) return; // another was chosen since
      offerRanks(tables, wanted);
      const now = chosen();
      at("fit-link").href = address(now);
      show(tables, now);
      list(tables, now);
    });
  }

  function start(found) {
    known = found;
    fill("model", known.models);
    fill("card", Object.keys(known.cards), (x) => `${x}, ${gb(known.cards[x])}`);
    fill("method", known.methods);
    fill("dtype", known.dtypes);
    fill("work", known.workloads.map(([n, t]) => `${n}x${t}`), (x) => x.replace("x", " x "));
    const asked = { ...START, ...Object.fromEntries(new URLSearchParams(location.search)) };
    const named = FIELDS.filter((name) => name !== "rank");
    const unknown = named.filter((name) => !choose(name, asked[name]));
    unknown.forEach((name) => choose(name, START[name]));
    form.addEventListener("change", () => refresh());
    if (unknown.length) warn(`${told(unknown, asked)}, which is not known here; choose below.`);
    refresh(Number(asked.rank) || Number(START.rank));
    withModel(form.elements.model.value, (tables) => checkRank(tables, asked));
  }

  const told = (names, asked) => names.map((name) => `${name}=${asked[name]}`).join(", ");

  function checkRank(tables, asked) {
    const ranks = ranksOf(tables, known.methods.find(isGalore));
    if (new URLSearchParams(location.search).has("rank") && !ranks.includes(Number(asked.rank))) {
      const others = `of ${tables.name} ${ranks.join(", ")} are planned; the nearest is shown`;
      warn(`${told(["rank"], asked)}: ${others}. On the command line any rank is.`);
    }
  }

  function warn(text) {
    const attributes = { class: "fit-warning", role: "alert" };
    form.before(element("p", `The address asks for ${text}`, attributes));
  }

  return { index: start, model: (tables) => (models[tables.name] = tables) };
})();
