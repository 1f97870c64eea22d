"use strict";
(() => {
  const nodes = JSON.parse(document.getElementById("nodes").textContent);
  const picture = document.getElementById("picture");
  const table = document.getElementById("table");
  const byId = (id) => document.getElementById(id);
  const shapes = {};  // node id -> every element that stands for it, in the picture and in the table
  const stand = (key, element) => { if (nodes[key]) (shapes[key] ||= []).push(element); };
  if (picture) for (const drawn of picture.querySelectorAll("g.node")) stand(drawn.id, drawn);
  for (const entry of table.querySelectorAll("[data-node]")) stand(entry.dataset.node, entry);
  let pinned = null;

  function mark(keys, name) {
    for (const old of document.querySelectorAll("." + name)) old.classList.remove(name);
    for (const key of keys) for (const element of shapes[key] || []) element.classList.add(name);
  }

  function inView(key) {
    const view = picture && !picture.hidden ? picture : table;
    return (shapes[key] || []).find((element) => view.contains(element));
  }

  function goTo(key) {
    const element = inView(key);
    if (element) element.scrollIntoView({ block: "center", inline: "center" });
  }

  function show(key) {
    const node = nodes[key];
    byId("subject").textContent = node.title;
    byId("help").hidden = true;
    byId("details").replaceChildren(...node.details.map((line) => {
      const item = document.createElement("li");
      item.textContent = line;
      return item;
    }));
    byId("related").replaceChildren(...node.related.map((other) => {
      const button = document.createElement("button");
      button.className = nodes[other].status;
      button.textContent = nodes[other].side + ": " + nodes[other].title;
      button.addEventListener("click", () => pin(other));
      return button;
    }));
  }

  function point(key) {
    mark([key, ...nodes[key].related], "lit");
    show(key);
  }

  function pin(key) {
    pinned = key;
    point(key);
    mark([key], "pinned");
    goTo(key);
  }

  for (const [key, elements] of Object.entries(shapes)) {
    for (const element of elements) {
      element.addEventListener("mouseenter", () => point(key));
      element.addEventListener("mouseleave", () => (pinned ? point(pinned) : mark([], "lit")));
      element.addEventListener("click", (event) => { event.preventDefault(); pin(key); });
      element.addEventListener("keydown", (event) => { if (event.key === "Enter") pin(key); });
    }
  }

  // -- views and zoom
  for (const tab of document.querySelectorAll("[data-view]")) {
    tab.addEventListener("click", () => {
      for (const other of document.querySelectorAll("[data-view]")) {
        other.setAttribute("aria-pressed", String(other === tab));
        byId(other.dataset.view).hidden = other !== tab;
      }
      if (pinned) goTo(pinned);
    });
  }
  if (picture) {
    const svg = picture.querySelector("svg");
    const box = svg.viewBox.baseVal;
    const natural = box.width * 4 / 3;
    let zoom = 1;
    const set = (to) => {
      zoom = Math.min(4, Math.max(0.05, to));
      svg.setAttribute("width", natural * zoom);
      svg.setAttribute("height", box.height * 4 / 3 * zoom);
    };
    const fit = () => set(Math.min(1.1, (picture.clientWidth - 40) / natural));
    byId("larger").addEventListener("click", () => set(zoom * 1.25));
    byId("smaller").addEventListener("click", () => set(zoom / 1.25));
    byId("fit").addEventListener("click", fit);
    fit();
  }
  byId("only").addEventListener("change", (event) => table.classList.toggle("only-changes", event.target.checked));

  // -- search
  let hits = [], at = -1;
  const search = byId("search");
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    hits = words.length ? Object.keys(nodes).filter((key) => words.every((word) => nodes[key].search.includes(word))) : [];
    at = -1;
    mark(hits, "hit");
    const found = new Set(hits);
    mark(words.length ? Object.keys(nodes).filter((key) => !found.has(key)) : [], "dim");
    byId("found").textContent = words.length ? hits.length + " found" : "";
    if (hits.length) goTo(hits[0]);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && hits.length) {
      at = (at + (event.shiftKey ? hits.length - 1 : 1)) % hits.length;
      pin(hits[at]);
    }
  });

  // -- from change to change, in the order of the table
  const changes = [...table.querySelectorAll(".row:not(.kept)")]
    .map((row) => [...row.querySelectorAll("[data-node]")].pop().dataset.node);
  let place = -1;
  const step = (by) => {
    if (!changes.length) return;
    place = (Math.max(place, by < 0 ? 0 : -1) + by + changes.length) % changes.length;
    pin(changes[place]);
  };
  byId("next").addEventListener("click", () => step(1));
  byId("previous").addEventListener("click", () => step(-1));
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "n") step(1);
    if (event.key === "p") step(-1);
  });

  // A link may name a node: diff.html#after-3
  const linked = decodeURIComponent(location.hash.slice(1));
  if (nodes[linked]) pin(linked);
})();
